/* SPDX-License-Identifier: Apache-2.0
 *
 * What a disk's own thread has (nbd_disk.c), and the commands that an operation becomes there (nbd_command.c).
 */
#ifndef VS_NBD_DISK_H
#define VS_NBD_DISK_H

#include <pthread.h>

#include "nbd_connection.h"

struct nbd_disk {
    struct vs_disk disk; /* first: the two share an address */
    struct vs_nbd *nbd;
    pthread_t thread;
    int wake_fd;
    pthread_mutex_t lock; /* guards the next six */
    struct list todo;     /* of disk_io, by work.remote_link */
    bool asleep;          /* the thread is, or is about to be */
    bool cut_off, ending;
    bool serves;            /* as vs_disk.serves was at the last submission */
    struct disk_host *host; /* whose disk it is, once something was submitted */
    bool closed;            /* or being closed by the thread, which ends with that */
    /* The thread's own. */
    struct list under_way; /* libnbd has them */
    struct list over;      /* to be given back */
    struct list held;      /* waits for another connection */
    struct disk_io *closing;
    uint32_t next_handle;
    bool no_fast_zero;
    bool lost;
    bool holding;
    bool served; /* so far it knows of serves */
    /* A flush since then was answered, and each write since then is durable when it is: none is forgotten. Not the
     * answer of a flush of an earlier time as the guest's disk: so all that were sent have to be answered. */
    bool durable;
    unsigned durable_asked;     /* such flushes that are under way */
    bool durable_failed;        /* one of them has */
    char why[VS_NBD_WHY_BYTES]; /* what libnbd has said last */
};

/* On the data thread, before each part of a zeroing. */
void nbd_plan_zero(const struct nbd_disk *d, struct disk_io *io);
/* The rest are the thread's. Sends the next part of io, which is under way then; or it is over at once. */
void nbd_command(struct nbd_disk *d, struct disk_io *io);
/* Asks for the flush after which "durable" holds. */
void nbd_begin_durable(struct nbd_disk *d);
/* io, which is under way, is over without an answer. */
void nbd_fail(struct nbd_disk *d, struct disk_io *io, int result);
bool nbd_any_lost(const struct nbd_disk *d);

static inline struct disk_io *nbd_io_at(struct list *node)
{
    return container_of(node, struct disk_io, work.remote_link);
}

#endif
