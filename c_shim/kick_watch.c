/* SPDX-License-Identifier: Apache-2.0 */
#include "kick_watch.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "attachment.h"

struct kick_watch {
    struct uring_op op;
    struct list link;    /* engine.watches */
    struct queue *queue; /* NULL: nobody cares any more */
    struct vs_engine *engine;
    int fd;
};

static void watch_arm(struct kick_watch *w)
{
    struct io_uring_sqe *sqe = uring_sqe(&w->engine->uring, &w->op);
    io_uring_prep_poll_multishot(sqe, w->fd, POLLIN);
    io_uring_sqe_set_data(sqe, &w->op);
}

static void watch_free(struct kick_watch *w)
{
    list_remove(&w->link);
    close(w->fd);
    free(w);
}

static void kicked(struct uring_op *op, int result, unsigned flags)
{
    struct kick_watch *w = container_of(op, struct kick_watch, op);
    uint64_t counter;
    bool over = !(flags & IORING_CQE_F_MORE);
    if (w->queue && result >= 0) {
        /* Emptied first, looked at afterwards: a later kick is a later event.
         * EAGAIN is no work, and looking does no harm. */
        ssize_t n = read(w->fd, &counter, sizeof counter);
        if (n > 0 || (n < 0 && errno == EAGAIN)) {
            w->engine->queue_stats[w->queue->index].kicks++;
            queue_ready(w->queue);
        } else {
            kick_watch_stop(w->queue); /* the other end is gone */
        }
    }
    if (!over)
        return;
    if (w->queue && result != -ECANCELED && result != -EBADF) {
        watch_arm(w); /* the kernel ended the multishot, not we */
        return;
    }
    if (w->queue)
        w->queue->watch = NULL;
    watch_free(w);
}

int kick_watch_start(struct queue *q, int fd)
{
    struct kick_watch *w = NULL;
    struct stat st;
    /* Files and devices are always readable: the ring would be looked at without end. */
    int rc = fstat(fd, &st) < 0 || S_ISCHR(st.st_mode) || S_ISBLK(st.st_mode) || S_ISREG(st.st_mode) ? -EINVAL : 0;
    if (rc == 0 && !(w = calloc(1, sizeof *w)))
        rc = -ENOMEM;
    if (rc < 0) {
        close(fd);
        return rc;
    }
    (void)fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    w->op.complete = kicked;
    w->engine = q->attachment->engine;
    w->queue = q;
    w->fd = fd;
    list_append(&w->engine->watches, &w->link);
    q->watch = w;
    watch_arm(w);
    return 0;
}

void kick_watch_stop(struct queue *q)
{
    struct kick_watch *w = q->watch;
    if (!w)
        return;
    q->watch = NULL;
    w->queue = NULL;
    /* Not poll_remove: that fails, and the poll stays, while a kick is on its way. */
    io_uring_prep_cancel(uring_sqe_detached(&w->engine->uring), &w->op, 0);
}

void kick_watches_free(struct vs_engine *e)
{
    struct list *node;
    while (e->watches.next && (node = list_pop(&e->watches)))
        watch_free(container_of(node, struct kick_watch, link));
}
