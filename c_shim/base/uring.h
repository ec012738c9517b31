/* SPDX-License-Identifier: Apache-2.0
 *
 * One io_uring and who owns what in it: an operation belongs to the kernel
 * from uring_sqe() until its complete() is called with the last completion.
 * Knows nothing of blocks.
 *
 * complete() runs while completions are reaped. It may prepare further
 * operations; it must not act on the request (disk.h queues that for later).
 */
#ifndef VS_URING_H
#define VS_URING_H

#include <liburing.h>
#include <stdbool.h>
#include <stdint.h>

struct uring_op {
    void (*complete)(struct uring_op *op, int result, unsigned flags);
};

struct uring {
    struct io_uring ring;
    uint64_t in_flight; /* operations whose last completion is to come */
    uint64_t enters;    /* io_uring_enter calls so far */
    int unrestricted;   /* 0, or why the kernel takes operations that uring.c does not list: a negative errno */
};

/* Must be called by the thread that will use the ring. 0 or a negative errno;
 * *step names the call that failed. */
int uring_init(struct uring *u, unsigned entries, unsigned cq_entries, const char **step);
void uring_free(struct uring *u);

/* A cleared entry for op; never NULL (what is queued is submitted when the ring is full). */
struct io_uring_sqe *uring_sqe(struct uring *u, struct uring_op *op);
/* The same for one whose completion concerns nobody. */
struct io_uring_sqe *uring_sqe_detached(struct uring *u);

/* Submits what is queued and waits for a completion until wait_ns have passed:
 * 0 does not wait (and is no system call where there is nothing to do), UINT64_MAX waits for ever. */
void uring_enter(struct uring *u, uint64_t wait_ns);

/* Hands over what is queued; waits for nothing. */
void uring_submit(struct uring *u);
/* Prepared, and not handed over yet. */
unsigned uring_queued(const struct uring *u);

/* There are completions, or some that the next uring_enter() will post. A look at shared memory, no system call. */
static inline bool uring_has_work(const struct uring *u)
{
    return io_uring_cq_ready(&u->ring) > 0 ||
           (__atomic_load_n(u->ring.sq.kflags, __ATOMIC_ACQUIRE) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW));
}

/* Calls complete() for everything that has completed; returns how many. */
unsigned uring_reap(struct uring *u);

#endif
