/* SPDX-License-Identifier: Apache-2.0
 *
 * A thread of one disk's own, for what may block and io_uring has no operation
 * for. It does one errand after the other; a disk that hangs in one holds up no
 * thread but this one. It decides nothing: its answers are completions.
 */
#ifndef VS_DISK_WORKER_H
#define VS_DISK_WORKER_H

#include <pthread.h>
#include <semaphore.h>

#include "list.h"

struct disk_io;

struct disk_worker {
    pthread_t thread;
    pthread_mutex_t lock; /* guards todo; held for no system call */
    struct list todo;     /* of disk_io, by work.remote_link; empty when "wake" is posted: the end */
    sem_t wake;
    int (*errand)(struct disk_io *io); /* on the thread; its result is the io's */
};

/* 0 or a negative errno. Not on the data thread. */
int disk_worker_start(struct disk_worker *w, int (*errand)(struct disk_io *io));
/* On the data thread. io completes by disk_complete_remote(). */
void disk_worker_give(struct disk_worker *w, struct disk_io *io);
/* The same for the last one: the thread ends with it, and does not touch *w once io is completed. */
void disk_worker_give_last(struct disk_worker *w, struct disk_io *io);
/* It has nothing to do, and nothing was the last. Waits for its end. */
void disk_worker_end(struct disk_worker *w);

#endif
