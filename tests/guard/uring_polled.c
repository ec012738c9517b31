/* SPDX-License-Identifier: Apache-2.0
 *
 * c_shim/base/uring.h without io_uring, for guard-count: valgrind runs one thread at a time and gives the next its turn
 * only at a system call that it knows may wait, and io_uring_enter is none to it. Here the one that waits is poll().
 *
 * Only what guard-push's works submit: polls, reads, writes, a cancel. Done at once, completed at the next reap.
 */
#include "uring.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

enum { SQES_MAX = 1024, WATCHES_MAX = 16, DONE_MAX = 2 * SQES_MAX };

static struct io_uring_sqe sqes[SQES_MAX];
static unsigned sqe_count;

static struct pollfd watched[WATCHES_MAX];
static struct uring_op *watcher[WATCHES_MAX]; /* whose; NULL: free */

static struct completion {
    struct uring_op *op;
    int result;
    unsigned flags;
} done[DONE_MAX];
static unsigned done_count;

int uring_init(struct uring *u, unsigned entries, unsigned cq_entries, const char **step)
{
    static unsigned zero; /* what uring_has_work() looks at: never any */
    (void)entries, (void)cq_entries, (void)step;
    memset(u, 0, sizeof *u);
    u->ring.sq.kflags = u->ring.cq.khead = u->ring.cq.ktail = &zero;
    for (unsigned i = 0; i < WATCHES_MAX; i++)
        watched[i].fd = -1;
    return 0;
}

void uring_free(struct uring *u)
{
    (void)u;
}

struct io_uring_sqe *uring_sqe_detached(struct uring *u)
{
    (void)u;
    assert(sqe_count < SQES_MAX);
    return memset(&sqes[sqe_count++], 0, sizeof sqes[0]);
}

struct io_uring_sqe *uring_sqe(struct uring *u, struct uring_op *op)
{
    struct io_uring_sqe *sqe = uring_sqe_detached(u);
    io_uring_sqe_set_data(sqe, op);
    u->in_flight++;
    return sqe;
}

static void complete(struct uring_op *op, int result, unsigned flags)
{
    assert(done_count < DONE_MAX);
    done[done_count++] = (struct completion){op, result, flags};
}

static void watch(struct uring_op *op, int fd)
{
    unsigned i = 0;
    while (watcher[i])
        i++;
    assert(i < WATCHES_MAX);
    watcher[i] = op;
    watched[i] = (struct pollfd){.fd = fd, .events = POLLIN};
}

static void unwatch(uint64_t op)
{
    for (unsigned i = 0; i < WATCHES_MAX; i++) {
        if ((uint64_t)(uintptr_t)watcher[i] != op)
            continue;
        complete(watcher[i], -ECANCELED, 0);
        watcher[i] = NULL;
        watched[i].fd = -1;
    }
}

static void take(const struct io_uring_sqe *sqe)
{
    struct uring_op *op = (void *)(uintptr_t)sqe->user_data;
    void *at = (void *)(uintptr_t)sqe->addr;
    ssize_t n;
    switch (sqe->opcode) {
    case IORING_OP_POLL_ADD:
        watch(op, sqe->fd);
        return;
    case IORING_OP_ASYNC_CANCEL:
        unwatch(sqe->addr);
        return;
    case IORING_OP_READ:
        n = pread(sqe->fd, at, sqe->len, (off_t)sqe->off);
        break;
    case IORING_OP_WRITE:
        n = pwrite(sqe->fd, at, sqe->len, (off_t)sqe->off);
        break;
    default:
        assert(!"an operation that no work of guard-push submits");
        return;
    }
    complete(op, n < 0 ? -errno : (int)n, 0);
}

void uring_submit(struct uring *u)
{
    u->enters++;
    for (unsigned i = 0; i < sqe_count; i++)
        take(&sqes[i]);
    sqe_count = 0;
}

unsigned uring_queued(const struct uring *u)
{
    (void)u;
    return sqe_count;
}

void uring_enter(struct uring *u, uint64_t wait_ns)
{
    uring_submit(u);
    if (done_count)
        wait_ns = 0;
    /* No deadline of the engine's matters to these works, so whole milliseconds will do. */
    if (poll(watched, WATCHES_MAX, wait_ns == UINT64_MAX ? -1 : (int)(wait_ns / 1000000)) <= 0)
        return;
    for (unsigned i = 0; i < WATCHES_MAX; i++)
        if (watcher[i] && watched[i].revents)
            complete(watcher[i], watched[i].revents, IORING_CQE_F_MORE);
}

unsigned uring_reap(struct uring *u)
{
    unsigned seen = done_count;
    for (unsigned i = 0; i < seen; i++) {
        if (!(done[i].flags & IORING_CQE_F_MORE))
            u->in_flight--;
        done[i].op->complete(done[i].op, done[i].result, done[i].flags);
    }
    assert(done_count == seen);
    done_count = 0;
    return seen;
}
