/* SPDX-License-Identifier: Apache-2.0
 *
 * The pool of requests, their bounce buffers, and the answer that ends each. See request.h.
 */
#include "request.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <string.h>
#include <sys/mman.h>

#include "attachment.h"

#define REQUESTS_BYTES (REQUEST_SLOTS * sizeof(struct request))

/* ---- the pool ----------------------------------------------------------- */

int requests_init(struct guest *g)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    list_init(&g->free_requests);
    if (ring_alloc_init(&g->bounce, BOUNCE_BYTES, LOG_UNIT_BYTES, REQUESTS_MAX) < 0)
        return -ENOMEM;
    g->requests = mmap(NULL, REQUESTS_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (g->requests == MAP_FAILED)
        g->requests = NULL;
    return g->requests ? 0 : -ENOMEM;
}

void requests_free(struct guest *g)
{
    for (unsigned i = 0; i < g->requests_made; i++)
        if (g->requests[i].table)
            mem_table_unpin(&g->requests[i].queue->attachment->memory, g->requests[i].table);
    if (g->requests)
        munmap(g->requests, REQUESTS_BYTES);
    ring_alloc_free(&g->bounce);
}

/* One that was used before, else the next one of memory that was never touched: it costs as much as is in use. */
struct request *request_spare(struct guest *g)
{
    struct request *r;
    if (!list_empty(&g->free_requests))
        return container_of(g->free_requests.next, struct request, link);
    if (g->requests_made == REQUEST_SLOTS)
        return NULL;
    r = &g->requests[g->requests_made++];
    r->guest = g;
    list_push(&g->free_requests, &r->link);
    return r;
}

/* ---- a buffer of our own -------------------------------------------------- */

bool request_take_bounce(struct request *r)
{
    struct guest *g = r->guest;
    r->bounce_slot = ring_take(&g->bounce, r->blk.length, &r->bounce);
    if (r->bounce_slot < 0)
        r->bounce = NULL;
    return r->bounce != NULL;
}

void request_give_bounce(struct request *r)
{
    if (r->bounce)
        ring_give(&r->guest->bounce, r->bounce_slot);
    r->bounce = NULL;
}

/* ---- the answer ------------------------------------------------------------ */
/* Bytes of its data segments, from the first on, that may be others now. */
static uint64_t data_written(const struct request *r, uint8_t status)
{
    if (r->blk.op == VS_OP_READ) /* one that failed may have been read in part, straight into the guest's memory */
        return status == VIRTIO_BLK_S_OK || !r->bounce ? r->blk.length : 0;
    return r->blk.op == VS_OP_OTHER && status == VIRTIO_BLK_S_OK ? VS_SERIAL_BYTES : 0;
}

/* Where the frontend wants to know what was written, also by requests that were taken up before it did. */
static void log_written(struct request *r, uint8_t status)
{
    struct dirty_log *log = &r->queue->attachment->dirty_log;
    uint64_t left = data_written(r, status);
    for (int i = 0; i < r->blk.iov_count && left > 0; i++) {
        uint64_t part = r->blk.iov[i].iov_len < left ? r->blk.iov[i].iov_len : left;
        dirty_log_mark_host(log, r->table, r->blk.iov[i].iov_base, part);
        left -= part;
    }
    dirty_log_mark_host(log, r->table, r->blk.status, 1);
}

void request_finish(struct request *r, uint8_t status)
{
    struct queue *q = r->queue;
    struct guest *g = r->guest;
    if (g->ends)
        return; /* as after a kill: no error of our end is the guest's, and no flush is confirmed without the mirror */
    op_stats_add(&g->frontends.queue_stats[q->index].op[r->blk.op], r->blk.length, g->host->now_ns - r->taken_ns,
                 status != VIRTIO_BLK_S_OK);
    request_give_bounce(r);
    *(volatile uint8_t *)r->blk.status = status;
    if (q->attachment->features & FEATURE_LOG_ALL)
        log_written(r, status);
    virtqueue_push(&q->vq, r->head, status == VIRTIO_BLK_S_OK ? r->blk.writable_bytes : 1);
    mem_table_unpin(&q->attachment->memory, r->table);
    r->table = NULL;
    list_push(&g->free_requests, &r->link); /* the one last used is warm in the cache */
    g->load.in_flight--;
    g->room = true;
    queue_finished_one(q);
}

void request_answer_read(struct request *r, const uint8_t *from)
{
    uint8_t status = from ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR;
    for (int i = 0; from && i < r->blk.iov_count; i++) {
        memcpy(r->blk.iov[i].iov_base, from, r->blk.iov[i].iov_len);
        from += r->blk.iov[i].iov_len;
    }
    request_finish(r, status);
}

bool error_is_of_disk(int error)
{
    return error != -EFAULT && error != -EINVAL && error != -ENOMEM && error != -EBADF;
}
