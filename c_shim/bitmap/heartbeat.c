/* SPDX-License-Identifier: Apache-2.0
 *
 * The heartbeat: keeps a moment in the bitmap's file, until which changes of the disks' files are our own.
 *
 * After a crash an image file is as the last run has left it if its ctime is no
 * later than what this run can have brought about. So while a bitmap is in use,
 * each pass that has submitted or completed a change of a disk promises, by a
 * moment in the bitmap's file, that changes until then are ours.
 *
 * Invariant: the file promises at least up to the last change, unless that
 * write is late: then a start copies everything, and loses nothing.
 *
 * The moment lies ahead, so that it is written a few times a second and not
 * with each request; by the ring's workers and not by a store into a mapping,
 * so that a file system that does not answer holds nobody up. The page cache
 * keeps it over the end of the process; over that of the machine, nothing has
 * to (heartbeat.py).
 *
 * The clock is the files' own. It is not this thread's, which stands still
 * while the process is stopped.
 */
#include "heartbeat.h"

#include <errno.h>
#include <time.h>
#include <unistd.h>

#include "activity_log.h"
#include "bitmap_layout.h"

/* Somebody else's change within this time after a crash passes for ours. */
#define AHEAD_NS 500000000u
/* Renewed while so much of it is left: for that long the write may take. */
#define LEFT_NS 250000000u
#define UNTIL_AT (BITMAP_BLOCK_BYTES - sizeof(struct heartbeat_until))

static uint64_t files_clock_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* Neither used up nor from before the clock was set back. */
static bool holds(uint64_t until_ns, uint64_t now_ns)
{
    return until_ns >= now_ns + LEFT_NS && until_ns <= now_ns + AHEAD_NS;
}

static void written(struct uring_op *op, int result, unsigned flags)
{
    struct heartbeat *h = container_of(op, struct heartbeat, op);
    (void)flags;
    h->in_flight = false;
    if (result != (int)sizeof h->until)
        h->until.source_ns = 0; /* the next change tries again */
}

int heartbeat_init(struct heartbeat *h, struct uring *uring, const struct vs_bitmap *bitmap)
{
    h->uring = uring;
    h->op.complete = written;
    if (!bitmap)
        return 0;
    if (pread(bitmap->fd, &h->until, sizeof h->until, UNTIL_AT) != (ssize_t)sizeof h->until)
        return -EIO;
    return 0;
}

void heartbeat_pump(struct heartbeat *h, const struct activity *activity, uint64_t changes, bool attached)
{
    const struct vs_bitmap *b = activity->bitmap;
    bool both = attached || h->attached;
    struct io_uring_sqe *sqe;
    uint64_t now;
    if (!b || !activity_tracks(activity) || h->in_flight || (h->changes_seen == changes && attached == h->attached))
        return;
    h->changes_seen = changes;
    h->attached = attached;
    now = files_clock_ns();
    if (holds(h->until.source_ns, now) && (!both || holds(h->until.destination_ns, now)))
        return;
    h->until.source_ns = now + AHEAD_NS;
    if (both)
        h->until.destination_ns = now + AHEAD_NS;
    sqe = uring_sqe(h->uring, &h->op);
    io_uring_prep_write(sqe, b->fd, &h->until, sizeof h->until, UNTIL_AT);
    io_uring_sqe_set_data(sqe, &h->op);
    io_uring_sqe_set_flags(sqe, IOSQE_ASYNC);
    h->in_flight = true;
}
