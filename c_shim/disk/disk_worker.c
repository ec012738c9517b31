/* SPDX-License-Identifier: Apache-2.0
 *
 * The thread of a disk for errands that may block. See disk_worker.h.
 */
#include "disk_worker.h"

#include <limits.h>
#include <stdbool.h>

#include "disk.h"

/* It calls nothing deep, and there is one for each disk. */
#define STACK_BYTES (64u << 10)

static struct disk_io *take(struct disk_worker *w)
{
    struct list *node;
    while (sem_wait(&w->wake) < 0)
        ;
    pthread_mutex_lock(&w->lock);
    node = list_pop(&w->todo);
    pthread_mutex_unlock(&w->lock);
    return node ? container_of(node, struct disk_io, work.remote_link) : NULL;
}

static void *run(void *arg)
{
    struct disk_worker *w = arg;
    struct disk_io *io;
    bool last = false;
    io_thread_begin("vhostsync-disk");
    while (!last && (io = take(w))) {
        last = io->kind == VS_DISK_CLOSE;
        disk_complete_remote(io, w->errand(io)); /* then the disk, and *w with it, may be gone */
    }
    return NULL;
}

int disk_worker_start(struct disk_worker *w, int (*errand)(struct disk_io *io))
{
    pthread_attr_t attributes;
    int rc;
    w->errand = errand;
    list_init(&w->todo);
    pthread_mutex_init(&w->lock, NULL);
    sem_init(&w->wake, 0, 0);
    pthread_attr_init(&attributes);
    (void)pthread_attr_setstacksize(&attributes, STACK_BYTES > PTHREAD_STACK_MIN ? STACK_BYTES : PTHREAD_STACK_MIN);
    rc = -pthread_create(&w->thread, &attributes, run, w);
    pthread_attr_destroy(&attributes);
    return rc;
}

void disk_worker_give(struct disk_worker *w, struct disk_io *io)
{
    pthread_mutex_lock(&w->lock);
    list_append(&w->todo, &io->work.remote_link);
    pthread_mutex_unlock(&w->lock);
    sem_post(&w->wake);
}

void disk_worker_give_last(struct disk_worker *w, struct disk_io *io)
{
    pthread_detach(w->thread);
    disk_worker_give(w, io);
}

void disk_worker_end(struct disk_worker *w)
{
    sem_post(&w->wake);
    pthread_join(w->thread, NULL);
    sem_destroy(&w->wake);
    pthread_mutex_destroy(&w->lock);
}
