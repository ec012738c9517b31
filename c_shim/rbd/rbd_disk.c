/* SPDX-License-Identifier: Apache-2.0
 *
 * A disk that is an image of a Ceph cluster, by librbd. The image is open, and
 * its exclusive lock is held, before it comes here (vhostsync/storage/rbd_image.py).
 *
 * Two threads of the disk's own, for any of librbd's calls may wait for one of
 * its locks. The submitting one hands reads, writes, zeroes and flushes over
 * to librbd, which copies what is to be written; their answers come by librbd's threads. The
 * looking one asks what takes its time: where holes are, how large the image
 * is, and it closes. Neither holds up the other, nor the data thread either of them.
 *
 * An answered write is durable on as many replicas as the pool wants, for
 * librbd's cache is off. librbd repeats what a connection has lost, in order,
 * for as long as it takes: no timeout may end that, because what was given up
 * might still be carried out. So an operation comes back when it is over, be
 * it days later; that the engine waits for no longer than it wants is its own
 * business. Until then its buffers are librbd's (durability.md, rule 8).
 *
 * Where the OSD fails that keeps the image's header, librbd takes the lock anew,
 * and refuses with EROFS what needs it meanwhile: writes and flushes, of some
 * images reads. That has not begun, so it is handed over again. A client that
 * somebody else has shut out is told so instead (ESHUTDOWN). Of one whose lock
 * was taken away otherwise, by hand, it is an error after LOCK_BACK_NS.
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "rbd_disk.h"
#include "rbd_holes.h"

/* A zeroing is handed over in parts, so that a large one does not fill librbd's queues, and is seen to come on. */
#define ZERO_PART_BYTES (64u << 20)
#define BLOCK_BYTES 512u
#define SECOND_NS 1000000000u
/* A cluster may need 20 s to notice that an OSD has died, and a second one may die. */
#ifndef LOCK_BACK_NS
#define LOCK_BACK_NS (60ull * SECOND_NS)
#endif
#define LOCK_PAUSE_NS 100000000u /* until it is tried again */

static const struct vs_disk_services *core;

/* A thread, and what it has to do: disk_io by work.remote_link. */
struct worker {
    pthread_t thread;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t came;
    struct list todo, later;
    uint64_t later_ns; /* when there is something: until then it waits */
    bool ending;
};

/* When librbd has refused something, for it took the lock anew: the first time of those that follow each other, and the
 * last; 0: never. Guarded by the submitting thread's lock. */
struct lock_wait {
    uint64_t since_ns, refused_ns;
};

struct rbd_disk {
    struct vs_disk disk; /* first: the two share an address */
    rbd_image_t image;
    rados_ioctx_t pool;
    rados_t cluster;
    uint32_t close_timeout_s;
    struct rbd_holes holes;
    struct worker submitting, looking;
    bool closed; /* or being closed by the looking thread, which ends with that */
    struct lock_wait wait;
    uint64_t client;
    struct list link; /* open_disks */
};

static pthread_mutex_t open_disks_lock = PTHREAD_MUTEX_INITIALIZER;
static struct list open_disks = {&open_disks, &open_disks};

/* ---- workers -------------------------------------------------------------------- */

static void worker_give(struct worker *w, struct disk_io *io)
{
    pthread_mutex_lock(&w->lock);
    list_append(&w->todo, &io->work.remote_link);
    if (w->todo.next == &io->work.remote_link) /* else it is awake, or will be */
        pthread_cond_signal(&w->came);
    pthread_mutex_unlock(&w->lock);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND_NS + (uint64_t)t.tv_nsec;
}

/* Something has come, or (if it returns by itself) it is later. */
static void worker_wait(struct worker *w)
{
    struct timespec later = {.tv_sec = (time_t)(w->later_ns / SECOND_NS), .tv_nsec = (long)(w->later_ns % SECOND_NS)};
    if (list_empty(&w->later))
        pthread_cond_wait(&w->came, &w->lock);
    else
        pthread_cond_timedwait(&w->came, &w->lock, &later);
}

/* All that has come, at least one; none: the end. What waits for its time holds up nothing that comes meanwhile. */
static void worker_take(struct worker *w, struct list *taken)
{
    pthread_mutex_lock(&w->lock);
    for (;;) {
        if (!list_empty(&w->later) && w->later_ns <= now_ns())
            list_splice(taken, &w->later);
        list_splice(taken, &w->todo);
        if (!list_empty(taken) || w->ending)
            break;
        worker_wait(w);
    }
    pthread_mutex_unlock(&w->lock);
}

/* 0 or an error number. */
static int worker_start(struct worker *w, void *(*run)(void *disk), struct rbd_disk *d)
{
    pthread_condattr_t by_uptime;
    list_init(&w->todo);
    list_init(&w->later);
    w->ending = false;
    pthread_mutex_init(&w->lock, NULL);
    pthread_condattr_init(&by_uptime);
    pthread_condattr_setclock(&by_uptime, CLOCK_MONOTONIC);
    pthread_cond_init(&w->came, &by_uptime);
    pthread_condattr_destroy(&by_uptime);
    return pthread_create(&w->thread, NULL, run, d);
}

static void worker_end(struct worker *w)
{
    pthread_mutex_lock(&w->lock);
    w->ending = true;
    pthread_cond_signal(&w->came);
    pthread_mutex_unlock(&w->lock);
}

/* ---- the submitting thread --------------------------------------------------------- */

/* Words that the engine would take for its own mistakes say nothing of a disk. */
static int of_disk(long error)
{
    return error == -EINVAL || error == -ENOMEM || error == -EFAULT || error == -EBADF || error < -4095 ? -EIO
                                                                                                        : (int)error;
}

/* Whether it was refused because librbd takes the lock anew, and is handed over again in a moment. */
static bool waits_for_the_lock(struct rbd_disk *d, struct disk_io *io, ssize_t result)
{
    struct worker *submitting = &d->submitting;
    struct lock_wait *w = &d->wait;
    uint64_t now;
    bool again;
    if (result != -EROFS)
        return false;
    pthread_mutex_lock(&submitting->lock);
    now = now_ns(); /* here, so that it is not before what another thread has noted */
    if (!w->refused_ns || now - w->refused_ns > SECOND_NS)
        w->since_ns = now; /* it is tried more often than that while one waits */
    w->refused_ns = now;
    again = now - w->since_ns < LOCK_BACK_NS;
    if (again) {
        if (list_empty(&submitting->later))
            submitting->later_ns = now + LOCK_PAUSE_NS;
        list_append(&submitting->later, &io->work.remote_link);
        pthread_cond_signal(&submitting->came);
    }
    pthread_mutex_unlock(&submitting->lock);
    return again;
}

/* By one of librbd's threads. */
static void answered(rbd_completion_t completion, void *arg)
{
    struct disk_io *io = arg;
    struct rbd_disk *d = (struct rbd_disk *)io->work.disk;
    ssize_t found = rbd_aio_get_return_value(completion);
    int result = 0;
    rbd_aio_release(completion);
    if (waits_for_the_lock(d, io, found))
        return;
    if (found < 0)
        result = of_disk(found);
    else if (io->kind == VS_DISK_READ && (uint64_t)found != io->length)
        result = -EIO; /* it has become shorter */
    else if (io->kind == VS_DISK_ZERO && (io->work.transferred += io->work.step_bytes) < io->length)
        result = DISK_GO_ON;
    core->complete_remote(io, result);
}

static int zero_part(struct rbd_disk *d, struct disk_io *io, rbd_completion_t completion)
{
    uint64_t left = io->length - io->work.transferred;
    io->work.step_bytes = left < ZERO_PART_BYTES ? left : ZERO_PART_BYTES;
    /* What may become a hole is never written out; what may not, always. rbd_aio_discard would leave parts of objects
     * as they are. */
    return rbd_aio_write_zeroes(d->image, io->offset + io->work.transferred, io->work.step_bytes, completion,
                                io->may_unmap ? 0 : RBD_WRITE_ZEROES_FLAG_THICK_PROVISION, 0);
}

static int submit(struct rbd_disk *d, struct disk_io *io, rbd_completion_t completion)
{
    switch (io->kind) {
    case VS_DISK_READ:
        return rbd_aio_readv(d->image, io->iov, io->iov_count, io->offset, completion);
    case VS_DISK_WRITE:
        return rbd_aio_writev(d->image, io->iov, io->iov_count, io->offset, completion);
    case VS_DISK_ZERO:
        return zero_part(d, io, completion);
    default:
        return rbd_aio_flush(d->image, completion);
    }
}

static void hand_over(struct rbd_disk *d, struct disk_io *io)
{
    rbd_completion_t completion;
    int result = rbd_aio_create_completion(io, answered, &completion);
    if (result < 0) {
        core->complete_remote(io, of_disk(result));
        return;
    }
    result = submit(d, io, completion);
    if (result < 0) {
        rbd_aio_release(completion);
        core->complete_remote(io, of_disk(result));
    }
}

static void *run_submitting(void *arg)
{
    struct rbd_disk *d = arg;
    struct list taken, *node;
    core->thread_begin("vhostsync-rbd");
    list_init(&taken);
    for (worker_take(&d->submitting, &taken); !list_empty(&taken); worker_take(&d->submitting, &taken))
        while ((node = list_pop(&taken)))
            hand_over(d, container_of(node, struct disk_io, work.remote_link));
    return NULL;
}

/* ---- the looking thread -------------------------------------------------------------- */

/* Nothing is under way that changes the image, so here timeouts may end what does not answer: the lock is given back,
 * or falls to whoever breaks it. */
static void close_all(struct rbd_disk *d)
{
    char seconds[16];
    snprintf(seconds, sizeof seconds, "%u", d->close_timeout_s);
    rados_conf_set(d->cluster, "rados_osd_op_timeout", seconds);
    rados_conf_set(d->cluster, "rados_mon_op_timeout", seconds);
    rbd_close(d->image);
    rados_ioctx_destroy(d->pool);
    rados_shutdown(d->cluster);
    pthread_mutex_lock(&open_disks_lock);
    list_remove(&d->link);
    pthread_mutex_unlock(&open_disks_lock);
}

int vs_rbd_has_client(uint64_t client)
{
    int found = 0;
    pthread_mutex_lock(&open_disks_lock);
    list_each(node, &open_disks)
        found |= container_of(node, struct rbd_disk, link)->client == client;
    pthread_mutex_unlock(&open_disks_lock);
    return found;
}

static void carry_out(struct rbd_disk *d, struct disk_io *io)
{
    int result = 0;
    switch (io->kind) {
    case VS_DISK_EXTENTS:
        rbd_holes_look(&d->holes, d->image, io->offset, io->length, &io->data_at, &io->data_end);
        break;
    case VS_DISK_SIZE:
        result = rbd_get_size(d->image, &io->size_bytes);
        break;
    default:
        worker_end(&d->submitting);
        pthread_join(d->submitting.thread, NULL);
        close_all(d);
    }
    core->complete_remote(io, result < 0 ? of_disk(result) : 0); /* then *d may be gone, if it was the last */
}

static void *run_looking(void *arg)
{
    struct rbd_disk *d = arg;
    struct list taken, *node;
    bool last = false;
    core->thread_begin("vhostsync-look");
    list_init(&taken);
    for (worker_take(&d->looking, &taken); !list_empty(&taken); worker_take(&d->looking, &taken)) {
        while ((node = list_pop(&taken))) {
            struct disk_io *io = container_of(node, struct disk_io, work.remote_link);
            last = io->kind == VS_DISK_CLOSE;
            carry_out(d, io);
        }
        if (last)
            return NULL;
    }
    return NULL;
}

/* ---- the data thread's side ------------------------------------------------------------- */

static void rbd_submit(struct vs_disk *disk, struct disk_io *io)
{
    struct rbd_disk *d = (struct rbd_disk *)disk;
    if (io->kind == VS_DISK_WRITE)
        rbd_holes_write(&d->holes, io->offset, io->length);
    if (io->kind == VS_DISK_CLOSE) {
        d->closed = true;
        pthread_detach(d->looking.thread);
    }
    worker_give(io->kind < VS_DISK_OPS ? &d->submitting : &d->looking, io);
}

static void worker_free(struct worker *w)
{
    pthread_mutex_destroy(&w->lock);
    pthread_cond_destroy(&w->came);
}

static void free_disk(struct rbd_disk *d)
{
    worker_free(&d->submitting);
    worker_free(&d->looking);
    rbd_holes_free(&d->holes);
    free(d);
}

static void rbd_close_disk(struct vs_disk *disk)
{
    struct rbd_disk *d = (struct rbd_disk *)disk;
    if (!d->closed) {
        worker_end(&d->submitting);
        worker_end(&d->looking);
        pthread_join(d->submitting.thread, NULL);
        pthread_join(d->looking.thread, NULL);
        close_all(d);
    }
    free_disk(d);
}

int vs_rbd_begin(const struct vs_disk_services *services)
{
    if (!disk_services_fit(services))
        return -EINVAL;
    core = services;
    return 0;
}

vs_disk *vs_rbd_disk(rbd_image_t image, rados_ioctx_t pool, rados_t cluster, uint64_t bytes, uint32_t close_timeout_s)
{
    static const struct disk_ops ops = {.submit = rbd_submit, .close = rbd_close_disk};
    struct rbd_disk *d = calloc(1, sizeof *d);
    int rc;
    if (!d)
        return NULL;
    core->init(&d->disk, &ops, bytes, BLOCK_BYTES, 1,
               DISK_TELLS_EXTENTS | DISK_TELLS_SIZE | DISK_CLOSES_LATER | DISK_IS_FAR);
    d->image = image;
    d->pool = pool;
    d->cluster = cluster;
    d->close_timeout_s = close_timeout_s;
    if (!rbd_holes_init(&d->holes, bytes)) {
        free(d);
        return NULL;
    }
    rc = worker_start(&d->submitting, run_submitting, d);
    if (rc != 0) {
        worker_free(&d->submitting);
        rbd_holes_free(&d->holes);
        free(d);
        errno = rc;
        return NULL;
    }
    rc = worker_start(&d->looking, run_looking, d);
    if (rc != 0) {
        worker_end(&d->submitting);
        pthread_join(d->submitting.thread, NULL);
        free_disk(d);
        errno = rc;
        return NULL;
    }
    d->client = rados_get_instance_id(cluster);
    pthread_mutex_lock(&open_disks_lock);
    list_append(&open_disks, &d->link);
    pthread_mutex_unlock(&open_disks_lock);
    rados_conf_set(cluster, "rados_osd_op_timeout", "0"); /* see above */
    return &d->disk;
}
