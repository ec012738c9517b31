/* SPDX-License-Identifier: Apache-2.0
 *
 * Waits for the guest's kicks, and never blocks on the descriptor that they come through.
 *
 * Polling does not block, whatever the descriptor is; reading might, for the same reasons as writing does (bell.c). So
 * an eventfd is read with RWF_NOWAIT, which no flag of the open file takes away, and everything else is read by a
 * worker of the ring.
 */
#include "kick_watch.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

struct kick_watch {
    struct uring_op op, empty_op;
    struct list link;           /* kick_watches.all */
    struct kick_target *target; /* NULL: nobody cares any more */
    struct bells *bells;
    int fd;
    bool event_fd;
    bool emptying, again; /* by a worker; and there was a kick meanwhile */
    bool poll_over;
    uint64_t counter[8]; /* what was read; pipes may hold several kicks */
};

static void watch_arm(struct kick_watch *w)
{
    struct io_uring_sqe *sqe = uring_sqe(w->bells->uring, &w->op);
    io_uring_prep_poll_multishot(sqe, w->fd, POLLIN);
    io_uring_sqe_set_data(sqe, &w->op);
}

static void watch_free(struct kick_watch *w)
{
    list_remove(&w->link);
    close_foreign_fd(w->bells, w->fd);
    free(w);
}

/* It was emptied, and is looked at afterwards: a later kick is a later event.
 * EAGAIN is no work, and looking does no harm. */
static void look(struct kick_watch *w, ssize_t result)
{
    if (result > 0 || result == -EAGAIN) {
        w->target->kicked(w->target);
    } else {
        kick_watch_stop(w->target); /* the other end is gone */
    }
}

static void empty(struct kick_watch *w)
{
    struct io_uring_sqe *sqe;
    if (w->emptying) {
        w->again = true;
        return;
    }
    w->emptying = true;
    w->again = false;
    w->bells->outside++;
    sqe = uring_sqe(w->bells->uring, &w->empty_op);
    io_uring_prep_read(sqe, w->fd, w->counter, sizeof w->counter, (uint64_t)-1);
    io_uring_sqe_set_data(sqe, &w->empty_op);
    io_uring_sqe_set_flags(sqe, IOSQE_ASYNC);
}

static void emptied(struct uring_op *op, int result, unsigned flags)
{
    struct kick_watch *w = container_of(op, struct kick_watch, empty_op);
    (void)flags;
    w->emptying = false;
    w->bells->outside--;
    if (w->target)
        look(w, result == -EINTR ? -EAGAIN : result);
    if (w->target && w->again)
        empty(w);
    if (w->poll_over && !w->emptying)
        watch_free(w);
}

static void empty_event_fd(struct kick_watch *w)
{
    struct iovec iov = {w->counter, sizeof w->counter[0]};
    ssize_t n = preadv2(w->fd, &iov, 1, -1, RWF_NOWAIT);
    look(w, n < 0 ? -errno : n);
}

static void kicked(struct uring_op *op, int result, unsigned flags)
{
    struct kick_watch *w = container_of(op, struct kick_watch, op);
    bool over = !(flags & IORING_CQE_F_MORE);
    if (w->target && result >= 0 && w->event_fd)
        empty_event_fd(w);
    else if (w->target && result >= 0)
        empty(w);
    if (!over)
        return;
    if (w->target && result != -ECANCELED && result != -EBADF) {
        watch_arm(w); /* the kernel ended the multishot, not we */
        return;
    }
    if (w->target)
        w->target->watch = NULL;
    w->target = NULL;
    w->poll_over = true;
    if (!w->emptying)
        watch_free(w);
}

/* Files and devices are always readable: the ring would be looked at without end. Nobody is asked but this kernel. */
static bool may_kick(int fd)
{
    struct statx st;
    mode_t type;
    if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE, &st) < 0)
        return false;
    type = st.stx_mode & S_IFMT;
    return type != S_IFCHR && type != S_IFBLK && type != S_IFREG && type != S_IFDIR;
}

void kick_watches_init(struct kick_watches *all, struct bells *bells)
{
    all->bells = bells;
    list_init(&all->all);
}

int kick_watch_start(struct kick_watches *all, struct kick_target *target, int fd)
{
    struct kick_watch *w = may_kick(fd) ? calloc(1, sizeof *w) : NULL;
    if (!w) {
        int rc = may_kick(fd) ? -ENOMEM : -EINVAL;
        close_foreign_fd(all->bells, fd);
        return rc;
    }
    (void)fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    w->op.complete = kicked;
    w->empty_op.complete = emptied;
    w->bells = all->bells;
    w->target = target;
    w->fd = fd;
    w->event_fd = is_event_fd(fd);
    list_append(&all->all, &w->link);
    target->watch = w;
    watch_arm(w);
    return 0;
}

static void cancel(struct kick_watch *w, struct uring_op *op)
{
    /* Not poll_remove: that fails, and the poll stays, while a kick is on its way. */
    io_uring_prep_cancel(uring_sqe_detached(w->bells->uring), op, 0);
}

void kick_watch_stop(struct kick_target *target)
{
    struct kick_watch *w = target->watch;
    if (!w)
        return;
    target->watch = NULL;
    w->target = NULL;
    cancel(w, &w->op);
    if (w->emptying)
        cancel(w, &w->empty_op);
}

void kick_watches_stop_emptying(struct kick_watches *all)
{
    list_each(node, &all->all) {
        struct kick_watch *w = container_of(node, struct kick_watch, link);
        if (w->emptying)
            cancel(w, &w->empty_op);
    }
}

void kick_watches_free(struct kick_watches *all)
{
    struct list *node;
    while (all->all.next && (node = list_pop(&all->all)))
        watch_free(container_of(node, struct kick_watch, link));
}
