/* SPDX-License-Identifier: Apache-2.0
 *
 * READ FIRST. A request's way, from pop to push.
 *
 *   peek -> parse -> [limit] -> room -> take -> [range slot] -> [extent] -> source I/O -> counts, log
 *        -> [durability] -> status, push
 *
 * A request is one struct from take to push. Where it can be, and what may
 * happen there:
 *
 *   in the ring        it is parsed where it lies; it stays there while there
 *                      is no struct, no log room or no credit for it, or a limit
 *                      of the guest's does not let it go yet, so that stopping a
 *                      ring never waits for the destination's room or for a limit
 *   waiting for a slot an overlapping write is on its way to the source
 *   waiting for an extent  the activity log is being written (activity_log.c)
 *   at the source      disk_io in flight
 *   kept back          the source has failed it: waiting for the destination (read_fallback.c), or for a switch
 *                      (source_failover.c), which sends it to the new source
 *   waiting for durability  a flush, or a write-through write (guest_flush.c)
 *   finished           status written, used element pushed; back to the pool
 *
 * Invariants:
 *   - A mirrored write has its log entry before it is taken. Its bytes are
 *     captured then, once; the source is written from the capture (rule 1).
 *   - Every content-changing request holds a range slot from take until the
 *     source has completed it (rule 2), and is counted either in
 *     mirror.captured_writes or in mirror.uncaptured_writes for that time.
 *   - source_generation moves before the used element is shown (durability.md).
 *   - The memory table that the request was translated with is pinned until it
 *     is finished.
 *
 * Not here: the pool and the answer (request.c), the ring's format
 * (virtqueue.c), the checks of a request (blk_request.c), what replicates it
 * (replicator.c).
 */
#include "request_path.h"

#include <linux/virtio_blk.h>
#include <string.h>

#include "attachment.h"
#include "read_fallback.h"
#include "request.h"
#include "source_failover.h"

static void room_freed(struct mirror_listener *l);
static void capture_ended(struct mirror_listener *l);
static void mark_in_flight(struct mirror_listener *l);
static bool source_flush_failed(struct mirror_listener *l, const struct disk_io *io, uint64_t number);
static void source_done(struct disk_io *io);
static void slot_granted(struct range_slot *slot);
static void entered(struct activity_wait *w);
static void durable(struct flush_waiter *w, int result);

void request_path_init(struct guest *g)
{
    g->listener = (struct mirror_listener){room_freed, capture_ended, mark_in_flight, source_flush_failed};
}

static bool changes_content(uint32_t op)
{
    return op == VS_OP_WRITE || op == VS_OP_DISCARD || op == VS_OP_WRITE_ZEROES;
}

/* ---- what the mirror tells ------------------------------------------------ */

static void room_freed(struct mirror_listener *l)
{
    container_of(l, struct guest, listener)->room = true;
}

/* Who waits for room in the log does not need it any more. */
static void capture_ended(struct mirror_listener *l)
{
    struct guest *g = container_of(l, struct guest, listener);
    queues_retry(&g->frontends);
    g->mirror->tap.retry_ns = 0;
    tap_wait_is_over(&g->mirror->tap);
}

/* A checkpoint begins: what is at the source is not covered by it. */
static void mark_in_flight(struct mirror_listener *l)
{
    struct guest *g = container_of(l, struct guest, listener);
    for (unsigned i = 0; i < g->requests_made; i++)
        if (g->requests[i].table && changes_content(g->requests[i].blk.op))
            difference_mark(&g->mirror->difference, g->requests[i].blk.offset, g->requests[i].blk.length);
}

static bool source_flush_failed(struct mirror_listener *l, const struct disk_io *io, uint64_t number)
{
    return source_failover_park_flush(container_of(l, struct guest, listener), io, number);
}

/* ---- the source -------------------------------------------------------- */

static void leave_source(struct request *r)
{
    range_release(&r->guest->mirror->source.slots, &r->slot);
    if (r->in_extents)
        activity_leave(r->guest->activity, r->blk.offset, r->blk.length);
}

static void write_failed(struct request *r)
{
    leave_source(r);
    tap_failed(&r->guest->mirror->tap, &r->write); /* rule 5 */
    request_finish(r, VIRTIO_BLK_S_IOERR);
}

/* Only what waits for a flush is one: most requests do not. */
static struct flush_waiter *as_flush(struct request *r)
{
    r->flush.done = durable;
    r->flush.destination_only = false;
    r->flush.owner = r->queue;
    return &r->flush;
}

static void write_completed(struct request *r)
{
    struct guest *g = r->guest;
    leave_source(r);
    r->generation = tap_completed(&g->mirror->tap, &r->write);
    if (r->write_through) {
        request_give_bounce(r); /* it may wait for long, and others need the room */
        guest_flush_asked_for(&g->mirror->flush, as_flush(r), r->generation);
    } else {
        request_finish(r, VIRTIO_BLK_S_OK);
    }
}

/* The guest is told (rule 5). */
static void source_failed(struct request *r)
{
    if (changes_content(r->blk.op))
        write_failed(r);
    else
        request_finish(r, VIRTIO_BLK_S_IOERR);
}

static void source_done(struct disk_io *io)
{
    struct request *r = container_of(io, struct request, io);
    bool writes = changes_content(r->blk.op);
    if (io->result < 0) {
        report_io_error(r->guest->mailbox, VS_SOURCE, io);
        if ((writes || !read_fallback_take(r, io->result)) && !source_failover_park(r, io))
            source_failed(r);
        return;
    }
    if (writes) {
        write_completed(r);
    } else if (r->bounce) {
        request_answer_read(r, r->bounce);
    } else {
        request_finish(r, VIRTIO_BLK_S_OK);
    }
}

/* Our own memory that the data goes through: the capture, or the bounce buffer; NULL: the guest's does. */
static uint8_t *own_buffer(const struct request *r)
{
    uint8_t *captured = mirrored_write_bytes(&r->write);
    return captured ? captured : r->bounce;
}

static void to_source(struct request *r)
{
    struct guest *g = r->guest;
    struct disk_io *io = &r->io;
    uint8_t *buffer = own_buffer(r);
    if (source_failover_holds(r))
        return;
    io->offset = r->blk.offset;
    io->length = r->blk.length;
    io->may_unmap = r->blk.may_unmap;
    io->done = source_done;
    /* Alone at the disk it has only a wake-up to lose by being handed over. */
    io->thread = g->mirror->source.disk->stats.in_flight ? io_thread_of_queue(&g->host->threads, r->queue->index) : 0;
    io->kind = r->blk.op == VS_OP_READ ? VS_DISK_READ : r->blk.op == VS_OP_WRITE ? VS_DISK_WRITE : VS_DISK_ZERO;
    if (buffer) {
        r->buffer_iov = (struct iovec){buffer, (size_t)r->blk.length};
        io->iov = &r->buffer_iov;
        io->iov_count = 1;
    } else {
        io->iov = r->blk.iov;
        io->iov_count = r->blk.iov_count;
    }
    disk_submit(g->mirror->source.disk, io);
}

/* It has its turn: its extents, then the source. Not the other way round: a write that waited for its extents could
 * be overtaken by a later one that overlaps it (rule 2). */
static void enter(struct request *r)
{
    struct guest *g = r->guest;
    r->activity.entered = entered;
    r->in_extents = tap_tracks(&g->mirror->tap) && g->activity->bitmap;
    if (!r->in_extents || activity_enter(g->activity, &r->activity, r->blk.offset, r->blk.length))
        to_source(r);
}

static void entered(struct activity_wait *w)
{
    to_source(container_of(w, struct request, activity));
}

static void slot_granted(struct range_slot *slot)
{
    enter(container_of(slot, struct request, slot));
}

static void durable(struct flush_waiter *w, int result)
{
    request_finish(container_of(w, struct request, flush), result < 0 ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK);
}

/* ---- taking up --------------------------------------------------------- */

static void gather_data(const struct request *r, uint8_t *to)
{
    for (int i = 0; i < r->blk.iov_count; i++) {
        memcpy(to, r->blk.iov[i].iov_base, r->blk.iov[i].iov_len);
        to += r->blk.iov[i].iov_len;
    }
}

/* Log room for a write that is to be mirrored, or false: not now. */
static bool reserve_log(struct request *r)
{
    enum log_kind kind = r->blk.op == VS_OP_WRITE ? LOG_WRITE : LOG_ZERO;
    r->write.offset = r->blk.offset;
    r->write.length = r->blk.length;
    return tap_reserve(&r->guest->mirror->tap, &r->write, kind, r->blk.may_unmap);
}

/* Whether it can go to the source that there is now; a buffer for it is taken if need be. */
static bool suits_source(struct request *r)
{
    if (own_buffer(r) || r->blk.op == VS_OP_DISCARD || r->blk.op == VS_OP_WRITE_ZEROES ||
        disk_iov_aligned(r->guest->mirror->source.disk, r->blk.iov, r->blk.iov_count))
        return true;
    if (!request_take_bounce(r))
        return false;
    if (r->blk.op == VS_OP_WRITE)
        gather_data(r, r->bounce);
    return true;
}

/* Everything that a request needs before it is taken; false: it stays in the ring. */
static bool reserve(struct request *r)
{
    struct guest *g = r->guest;
    if (changes_content(r->blk.op) && !reserve_log(r))
        return false;
    if ((r->blk.op == VS_OP_READ || (r->blk.op == VS_OP_WRITE && !r->write.entry)) &&
        !disk_iov_aligned(g->mirror->source.disk, r->blk.iov, r->blk.iov_count))
        return request_take_bounce(r);
    return true;
}

/* Its turn among the writes that overlap it. */
static void take_slot(struct request *r)
{
    struct guest *g = r->guest;
    r->slot.grant = slot_granted;
    if (range_take(&g->mirror->source.slots, &r->slot, r->blk.offset, r->blk.length))
        enter(r);
}

/* Virtio 1.x, 5.2.6.2: write-back only if the driver can flush or said so. */
static bool is_write_through(const struct queue *q)
{
    const uint64_t able = 1ull << VIRTIO_BLK_F_FLUSH | 1ull << VIRTIO_BLK_F_CONFIG_WCE;
    return !q->attachment->write_cache || !(q->attachment->features & able);
}

static void start_write(struct request *r)
{
    struct tap *tap = &r->guest->mirror->tap;
    if (own_buffer(r))
        gather_data(r, own_buffer(r));
    if (guest_memory_lost(&r->queue->attachment->memory)) {
        /* What was gathered may be the zeroes of the SIGBUS handler, not the guest's data. */
        tap_give_back(tap, &r->write);
        request_finish(r, VIRTIO_BLK_S_IOERR);
        return;
    }
    r->write_through = is_write_through(r->queue);
    tap_taken(tap, &r->write);
    take_slot(r);
}

static void answer_id(struct request *r)
{
    const char *serial = r->guest->config->serial;
    size_t left = VS_SERIAL_BYTES;
    for (int i = 0; i < r->blk.iov_count && left; i++) {
        size_t part = r->blk.iov[i].iov_len < left ? r->blk.iov[i].iov_len : left;
        memcpy(r->blk.iov[i].iov_base, serial, part);
        serial += part;
        left -= part;
    }
    request_finish(r, VIRTIO_BLK_S_OK);
}

static void start(struct request *r, int verdict)
{
    struct guest *g = r->guest;
    struct queue *q = r->queue;
    if (verdict != BLK_OK) {
        g->frontends.queue_stats[q->index].malformed++;
        r->blk.length = 0;
        request_finish(r, verdict == BLK_UNSUPP ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR);
        return;
    }
    switch (r->blk.op) {
    case VS_OP_READ:
        to_source(r);
        break;
    case VS_OP_WRITE:
    case VS_OP_DISCARD:
    case VS_OP_WRITE_ZEROES:
        start_write(r);
        break;
    case VS_OP_FLUSH:
        guest_flush_asked(&g->mirror->flush, as_flush(r));
        break;
    default:
        answer_id(r);
    }
}

enum { TAKE_STALLED = 0, TAKE_TAKEN = 1, TAKE_LIMITED = 2 };

/* Takes the head of the ring, if it may go and what it needs is there. Or minus an enum vs_breach. */
static int take_up(struct guest *g, struct queue *q, uint16_t head)
{
    struct request *r;
    bool limited;
    int verdict;
    if (g->load.in_flight - guest_flush_guests(&g->mirror->flush) >= REQUESTS_MAX || !(r = request_spare(g)))
        return TAKE_STALLED;
    verdict = blk_request_parse(&r->blk, &q->vq, q->attachment->memory.current, head, &g->limits);
    if (verdict < 0)
        return verdict;
    r->write.entry = NULL;
    r->bounce = NULL;
    limited = g->limited.limit.on && verdict == BLK_OK;
    if (limited && limited_rings_wait(&g->limited, q, &r->blk, g->host->now_ns))
        return TAKE_LIMITED;
    if (verdict == BLK_OK && !reserve(r)) {
        tap_give_back(&g->mirror->tap, &r->write);
        return TAKE_STALLED;
    }
    if (limited)
        limited_rings_taken(&g->limited, q, &r->blk);
    virtqueue_take(&q->vq, head);
    list_remove(&r->link);
    r->queue = q;
    r->head = head;
    r->table = mem_table_pin(&q->attachment->memory);
    r->taken_ns = g->host->now_ns;
    q->in_flight++;
    q->attachment->in_flight++;
    g->load.in_flight++;
    g->taken_in_pass++;
    g->load.last_taken_ns = r->taken_ns;
    start(r, verdict);
    return TAKE_TAKEN;
}

enum service request_path_service(struct guest *g, struct queue *q)
{
    uint16_t head;
    int rc;
    virtqueue_no_kicks(&q->vq);
    for (unsigned n = 0; n < PASS_BUDGET; n++) {
        rc = virtqueue_peek(&q->vq, &head);
        if (rc == 0) {
            if (poller_keeps(&g->poller, q) || !virtqueue_ask_for_kick(&q->vq))
                return SERVICE_EMPTY;
            continue; /* one came in between */
        }
        if (rc > 0)
            rc = take_up(g, q, head);
        if (rc == TAKE_STALLED)
            return SERVICE_STALLED;
        if (rc == TAKE_LIMITED)
            return SERVICE_LIMITED;
        if (rc < 0) {
            queue_break(q, (uint32_t)-rc);
            return SERVICE_EMPTY;
        }
        if (n + 1 == EARLY_SUBMIT && g->mirror->source.disk->stats.in_flight == uring_queued(g->host->uring))
            uring_submit(g->host->uring);
        if ((n + 1) % EARLY_NOTIFY == 0 && !list_empty(&g->host->done) && !tap_captures(&g->mirror->tap)) {
            /* I/O that completes at once: let the guest's core refill the ring while we go on.
             * Not while mirroring, where this thread is the narrow place already. */
            disk_run_done(g->host);
            queues_notify(&g->frontends);
        }
    }
    return SERVICE_MORE;
}

void request_path_pump(struct guest *g)
{
    if (g->failover.pending)
        return;
    /* One that needs a buffer on the new disk may have to wait for it. */
    list_each_safe(node, &g->failover.parked) {
        struct request *r = container_of(node, struct request, link);
        if (!r->parked_error && !suits_source(r))
            continue;
        list_remove(node);
        if (r->parked_error)
            source_failed(r);
        else
            to_source(r);
    }
}
