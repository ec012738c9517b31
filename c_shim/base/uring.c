/* SPDX-License-Identifier: Apache-2.0
 *
 * Makes an io_uring that takes only the operations that this program needs, hands out its entries and reaps its
 * completions. See uring.h.
 */
#include "uring.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bounds.h"

/* The kernel has few workers (4 a processor) for what cannot be begun without
 * sleeping, shared by all disks of this thread. A destination that hangs must not
 * occupy those that the source needs. They are made on demand; kernels before
 * 5.15 have no such setting, and keep their bound. */
static void allow_workers(struct uring *u)
{
    unsigned workers[2] = {URING_WORKERS, 0};
    (void)io_uring_register_iowq_max_workers(&u->ring, workers);
}

/* All that the engine asks of a ring. A request of another kind, or with another flag, is answered EACCES by the
 * kernel: seccomp sees none of them, so whoever got hold of this process could open, connect and rename here. */
/* clang-format off */
static const uint8_t operations[] = {
    IORING_OP_READ,   IORING_OP_READV,     IORING_OP_WRITE,    IORING_OP_WRITEV,
    IORING_OP_FSYNC,  IORING_OP_FALLOCATE, /* disk_file.c, activity_log.c */
    IORING_OP_POLL_ADD, IORING_OP_ASYNC_CANCEL, /* kick_watch.c, engine.c, io_threads.c */
    IORING_OP_CLOSE, /* bell.c */
};
/* clang-format on */
static const uint8_t operation_flags = IOSQE_ASYNC;

enum { OPERATIONS = sizeof operations };

/* liburing 2.3 declares functions for these two, and its shared library lacks them. */
static int register_in(struct uring *u, unsigned opcode, const void *arg, unsigned count)
{
    return syscall(SYS_io_uring_register, u->ring.ring_fd, opcode, arg, count) < 0 ? -errno : 0;
}

/* From here on, for good. Also enables the ring, which was made disabled: with SINGLE_ISSUER the thread that
 * enables it is the one that may submit. 0 or a negative errno; the ring is of no use then. */
static int restrict_ring(struct uring *u)
{
    struct io_uring_restriction allowed[OPERATIONS + 1] = {
        {.opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED, .sqe_flags = operation_flags},
    };
    int rc;
    for (unsigned i = 0; i < OPERATIONS; i++)
        allowed[i + 1] = (struct io_uring_restriction){.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = operations[i]};
    rc = register_in(u, IORING_REGISTER_RESTRICTIONS, allowed, OPERATIONS + 1);
    return rc < 0 ? rc : register_in(u, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
}

static int make_ring(struct uring *u, unsigned entries, unsigned cq_entries, unsigned more_flags, const char **step)
{
    /* DEFER_TASKRUN and SINGLE_ISSUER came with Linux 6.1: completions are then
     * worked off when this thread enters, never by interrupting it. Older
     * kernels answer EINVAL and get a plain ring. */
    static const unsigned flags[] = {
        IORING_SETUP_CQSIZE | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
        IORING_SETUP_CQSIZE | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
        IORING_SETUP_CQSIZE,
    };
    int rc = -EINVAL;
    memset(u, 0, sizeof *u);
    for (size_t i = 0; i < sizeof flags / sizeof flags[0] && rc == -EINVAL; i++) {
        struct io_uring_params p = {.flags = flags[i] | more_flags, .cq_entries = cq_entries};
        rc = io_uring_queue_init_params(entries, &u->ring, &p);
        if (rc == 0 && !(p.features & (IORING_FEAT_EXT_ARG))) {
            io_uring_queue_exit(&u->ring);
            *step = "io_uring_setup (Linux 5.11 or newer is needed)";
            return -ENOSYS;
        }
    }
    if (rc < 0)
        *step = "io_uring_setup";
    else
        allow_workers(u);
    return rc;
}

int uring_init(struct uring *u, unsigned entries, unsigned cq_entries, const char **step)
{
    int unrestricted, rc = make_ring(u, entries, cq_entries, IORING_SETUP_R_DISABLED, step);
    if (rc < 0)
        return rc;
    unrestricted = restrict_ring(u);
    if (unrestricted == 0)
        return 0;
    /* A container may allow the other calls of io_uring and not io_uring_register. */
    io_uring_queue_exit(&u->ring);
    rc = make_ring(u, entries, cq_entries, 0, step);
    u->unrestricted = unrestricted;
    return rc;
}

void uring_free(struct uring *u)
{
    io_uring_queue_exit(&u->ring);
}

static struct io_uring_sqe *take_sqe(struct uring *u)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&u->ring);
    while (!sqe) {
        u->enters++;
        io_uring_submit(&u->ring);
        sqe = io_uring_get_sqe(&u->ring);
    }
    memset(sqe, 0, sizeof *sqe);
    return sqe;
}

struct io_uring_sqe *uring_sqe(struct uring *u, struct uring_op *op)
{
    struct io_uring_sqe *sqe = take_sqe(u);
    io_uring_sqe_set_data(sqe, op);
    u->in_flight++;
    return sqe;
}

struct io_uring_sqe *uring_sqe_detached(struct uring *u)
{
    return take_sqe(u);
}

void uring_enter(struct uring *u, uint64_t wait_ns)
{
    struct io_uring_cqe *cqe;
    if (wait_ns == 0 && io_uring_sq_ready(&u->ring) == 0 && !uring_has_work(u))
        return;
    u->enters++;
    if (wait_ns == 0) {
        /* Also makes the kernel post what DEFER_TASKRUN has put off. */
        io_uring_submit_and_get_events(&u->ring);
    } else if (wait_ns == UINT64_MAX) {
        io_uring_submit_and_wait(&u->ring, 1);
    } else {
        struct __kernel_timespec ts = {.tv_sec = (int64_t)(wait_ns / 1000000000u),
                                       .tv_nsec = (int64_t)(wait_ns % 1000000000u)};
        io_uring_submit_and_wait_timeout(&u->ring, &cqe, 1, &ts, NULL);
    }
    /* EINTR, EAGAIN, EBUSY and ETIME all mean the same here: look at what has
     * completed; entries that were not taken stay queued for the next call. */
}

void uring_submit(struct uring *u)
{
    if (io_uring_sq_ready(&u->ring) == 0)
        return;
    u->enters++;
    io_uring_submit(&u->ring);
}

unsigned uring_queued(const struct uring *u)
{
    return io_uring_sq_ready(&u->ring);
}

unsigned uring_reap(struct uring *u)
{
    struct io_uring_cqe *cqe;
    unsigned head, seen = 0;
    io_uring_for_each_cqe(&u->ring, head, cqe) {
        struct uring_op *op = io_uring_cqe_get_data(cqe);
        seen++;
        if (!op)
            continue;
        if (!(cqe->flags & IORING_CQE_F_MORE)) {
            assert(u->in_flight > 0);
            u->in_flight--;
        }
        op->complete(op, cqe->res, cqe->flags);
    }
    io_uring_cq_advance(&u->ring, seen);
    return seen;
}
