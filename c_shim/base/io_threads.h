/* SPDX-License-Identifier: Apache-2.0
 *
 * Threads that do a share of the disks' work: the system calls, and the
 * copying of cached data (io_threads.c has the theory). They know jobs, not
 * disks.
 */
#ifndef VS_IO_THREADS_H
#define VS_IO_THREADS_H

#include <pthread.h>
#include <stdatomic.h>

#include "bounds.h"
#include "uring.h"

struct io_thread;

/* Lent to a thread from io_threads_lend() until over() is called. */
struct io_job {
    /* On the I/O thread: prepares an operation of "op" in this ring (false), or does the job at once, with *result
     * (true). */
    bool (*start)(struct io_job *job, struct uring *uring, int *result);
    void (*over)(struct io_job *job); /* on the data thread */
    int result;
    struct uring_op op;
    struct io_thread *thread;
};

/* From one thread to one other. Each end's own index lies in a cache line of its own. */
struct io_channel {
    _Alignas(64) atomic_uint tail; /* the giver's */
    _Alignas(64) atomic_uint head; /* the taker's */
    _Alignas(64) struct io_job *job[IO_CHANNEL_JOBS];
};

struct io_threads {
    unsigned count;           /* with the data thread: 1 is that one alone */
    struct io_thread *thread; /* 1 .. count-1 */
    int wake_fd;              /* wakes the data thread */
    uint64_t lent, wakes;     /* jobs, and wake-ups of I/O threads, so far */
    atomic_bool asleep;       /* the data thread is, or is about to be */
};

/* First thing on every thread of the data plane, the data thread too. */
void io_thread_begin(const char *name);
/* Starts count-1 threads; 0 or a negative errno, *step names what failed. wake_fd is signalled for the data thread. */
int io_threads_start(struct io_threads *t, unsigned count, int wake_fd, const char **step);
/* Nothing is lent. Waits for their ends. */
void io_threads_stop(struct io_threads *t);
/* uring.unrestricted of their rings: the first that is not 0. */
int io_threads_unrestricted(const struct io_threads *t);
/* System calls of the I/O threads, and those that wake one of them or the data thread, so far. */
uint64_t io_threads_syscalls(const struct io_threads *t);

/* Which thread works for a queue, and which for what runs beside the guest. 0 is the data thread. */
static inline unsigned io_thread_of_queue(const struct io_threads *t, uint32_t queue)
{
    return queue % t->count;
}

static inline unsigned io_thread_beside(const struct io_threads *t, unsigned number)
{
    return t->count > 1 ? 1 + number % (t->count - 1) : 0;
}

/* number: 1 .. count-1. Nobody is woken before io_threads_wake(). */
void io_threads_lend(struct io_threads *t, unsigned number, struct io_job *job);
/* Wakes the threads that have got jobs and sleep. Cheap when there is nothing to do. */
void io_threads_wake(struct io_threads *t);
/* Calls over() of all that came back. */
void io_threads_take_back(struct io_threads *t);
/* Something came back. A look at shared memory. */
bool io_threads_returned(const struct io_threads *t);
/* The data thread is about to sleep; false: it must not, something has come back. */
bool io_threads_may_sleep(struct io_threads *t);
void io_threads_awake(struct io_threads *t);

#endif
