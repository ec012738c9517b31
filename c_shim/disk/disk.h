/* SPDX-License-Identifier: Apache-2.0
 *
 * A disk behind one small ops struct, one file for each kind: files and block
 * devices (disk_file.c); others come from libraries of their own
 * (disk_services.h), those of the tests among them (c_shim/testing).
 * Nobody asks which kind a disk is. What it can do, and how it fails, is in one
 * word (enum disk_can); what a kind leaves out, disk.c answers for it.
 *
 * disk_submit() is the one gate of every operation on a disk: it asserts what
 * the callers promise (bounds, alignment), counts and takes the time. An
 * operation belongs to the disk until its done() is called, exactly once, from
 * disk_run_done(), never from within disk_submit(): so there is no recursion.
 */
#ifndef VS_DISK_H
#define VS_DISK_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/uio.h>

#include "io_threads.h"
#include "list.h"
#include "shim.h"
#include "uring.h"

/* How far an operation is. For disk.c and the kinds of disks alone. */
struct disk_work {
    struct vs_disk *disk;
    struct io_job job;
    struct list link;        /* in flight, then done: disk.c's */
    struct list remote_link; /* at the disk's worker, then completed by another thread: guarded by disk_host.lock */
    uint64_t submitted_ns;
    uint64_t progress_ns; /* the last time that a part of it completed */
    uint64_t transferred;
    size_t iov_taken; /* off the first of the iov that are left */
    int step;
    uint64_t step_bytes; /* at most so much is zeroed in this step */
    bool durable;        /* a write or zeroing is done only when it is durable: for kinds that DISK_WRITES_DURABLY */
    bool unanswered;     /* set with a failure: the connection was lost after it was sent; it may land yet (rule 8) */
};

struct disk_io {
    /* Set by the caller. */
    uint32_t kind;    /* enum vs_disk_op, or enum vs_disk_errand */
    bool to_data_end; /* VS_DISK_EXTENTS: how far the data goes is wanted, too */
    bool may_unmap;   /* VS_DISK_ZERO: the range may become a hole */
    uint64_t offset;
    uint64_t length;
    struct iovec *iov; /* read and write: adds up to length; as it was again at done() */
    int iov_count;
    unsigned thread; /* which of the host's threads does the work (io_threads.h); 0: the data thread */
    void (*done)(struct disk_io *io);
    /* Set when done() is called: 0 or a negative errno. Short transfers were continued. */
    int result;
    /* Of VS_DISK_EXTENTS: up to data_at there is a hole, from there to data_end there may be data. Both lie in the
     * range that was asked about. For whom it comes back to it has not failed: who could not tell has told of data. */
    uint64_t data_at, data_end;
    uint64_t size_bytes; /* of VS_DISK_SIZE */
    struct disk_work work;
};

/* What an engine lends to its disks. */
struct disk_host {
    struct uring *uring;
    struct io_threads threads;
    uint64_t now_ns;  /* CLOCK_MONOTONIC, read once per pass of the engine's loop */
    uint64_t changes; /* counts what may give a disk's file a new time, when it begins and when it is over */
    struct list done;
    /* Completions from other threads: lock guards remote. Who adds the first one signals wake_fd. */
    pthread_mutex_t lock;
    struct list remote;
    int wake_fd;
};

/* Errands are asynchronous, and each may be left out. */
enum disk_can {
    DISK_TELLS_EXTENTS = 1u << 0,        /* VS_DISK_EXTENTS; else all of the disk counts as data */
    DISK_TELLS_SIZE = 1u << 1,           /* VS_DISK_SIZE; else it stays as large as it was when it was opened */
    DISK_CLOSES_LATER = 1u << 2,         /* VS_DISK_CLOSE, for closing may block; else ops->close() does all of it */
    DISK_FORGETS_FAILED_FLUSH = 1u << 3, /* a flush after one that has failed may succeed without the data */
    DISK_CAN_BE_CUT_OFF = 1u << 4,       /* ops->cut_off() */
    DISK_ONE_BUFFER = 1u << 5,           /* the data of an operation has to be one piece of memory */
    DISK_WRITES_DURABLY = 1u << 6, /* each write, where a guest is served from it: it may forget what was not flushed */
    DISK_IS_FAR = 1u << 7,         /* over a network: while nothing is asked of it, it may go without a word */
};

/* In place of a result, from another thread: a part is done, and the disk is to be given the rest. */
#define DISK_GO_ON 1

struct disk_ops {
    /* Ends in disk_complete() or disk_complete_remote(), now or later. Of the errands, only those that it can do. */
    void (*submit)(struct vs_disk *disk, struct disk_io *io);
    /* Ends its connection, for it does not answer: all that is in flight fails soon, and so does all that comes later.
     * On the data thread; does not block; may be asked twice. */
    void (*cut_off)(struct vs_disk *disk);
    /* Nothing is in flight any more. Closes it, unless that is done, and frees it. */
    void (*close)(struct vs_disk *disk);
};

struct vs_disk {
    const struct disk_ops *ops;
    uint64_t bytes;
    uint32_t block_bytes;        /* offsets and lengths are multiples of it */
    uint32_t memory_align_bytes; /* buffers are */
    uint32_t can;                /* of enum disk_can */
    bool flush_failed;           /* and would be forgotten, so it stays an error */
    bool unanswered;             /* so was a change of it (disk_work) */
    atomic_bool lost;            /* so is its connection: told by the disk, from any thread, as soon as it knows */
    bool serves;                 /* a guest is on it: it is the source */
    struct disk_host *host;
    struct list in_flight_list; /* every io between submit and done, by work.progress_ns */
    struct disk_io closing;
    void *closing_for; /* of disk_close_later() */
    struct vs_disk_stats stats;
};

void disk_host_init(struct disk_host *host, struct uring *uring, int wake_fd);
void disk_host_free(struct disk_host *host);

void disk_init(struct vs_disk *disk, const struct disk_ops *ops, uint64_t bytes, uint32_t block_bytes,
               uint32_t memory_align_bytes, uint32_t can);
/* An engine takes the disk. */
void disk_adopt(struct vs_disk *disk, struct disk_host *host);
/* Not on the data thread: it may take as long as the disk likes. */
void disk_close(struct vs_disk *disk);
/* On the data thread: nothing is in flight any more. over(&disk->closing) is called when it is closed, and calls
 * disk_free(). Until then it counts as one in flight. */
void disk_close_later(struct vs_disk *disk, void (*over)(struct disk_io *closing), void *closing_for);
void disk_free(struct vs_disk *disk);

/* It is the source from here on, or is not any more. Nothing is in flight. */
void disk_serve(struct vs_disk *disk, bool serves);

void disk_submit(struct vs_disk *disk, struct disk_io *io);
/* What is in flight comes back, for it has not answered for too long. False: it cannot be cut off. */
bool disk_cut_off(struct vs_disk *disk);
/* By the disk, on the engine's thread: queues io for done(). */
void disk_complete(struct disk_io *io, int result);
/* By the disk: a part of io is done, and the rest under way. A large zeroing on a disk that has to write it takes
 * long, and yet the disk answers. */
void disk_progress(struct disk_io *io);
/* disk_complete() from any other thread. */
void disk_complete_remote(struct disk_io *io, int result);
/* The same of all in the list (by work.remote_link), each with its result or DISK_GO_ON; empties the list. */
void disk_complete_remote_all(struct disk_host *host, struct list *ios);

/* Calls done() of all that has completed; returns how many. */
unsigned disk_run_done(struct disk_host *host);

bool disk_iov_aligned(const struct vs_disk *disk, const struct iovec *iov, int count);
/* Of VS_DISK_EXTENTS: no holes are known. */
void disk_all_data(struct disk_io *io);
/* The whole range is a hole. */
bool disk_found_hole(const struct disk_io *io);
/* When the operation that has gone longest without progress last made some; UINT64_MAX: none is in flight. */
uint64_t disk_oldest_ns(const struct vs_disk *disk);

/* Takes the first "bytes" off what is left of io's iovec array, in place, for the disk to go on with the rest. */
void disk_io_advance(struct disk_io *io, uint64_t bytes);
/* Gives back what was taken off the segment in which it stands. */
void disk_io_restore(struct disk_io *io);
uint64_t iov_bytes(const struct iovec *iov, int count);

/* Since it was submitted. */
static inline uint64_t disk_io_age_ns(const struct disk_io *io, uint64_t now_ns)
{
    return now_ns - io->work.submitted_ns;
}

void op_stats_add(struct vs_op_stats *s, uint64_t bytes, uint64_t latency_ns, bool failed);

#endif
