/* SPDX-License-Identifier: Apache-2.0
 *
 * Which rings run. Several attachments may negotiate at once (a local live
 * migration's two sides do), and one of them runs rings: the first whose ring
 * could run becomes the active one, and stays it until none of its rings is
 * started and enabled and none of its requests is in flight.
 *
 * What frontends send here comes in many orders (docs: field practice), so a
 * ring is not refused for what it lacks yet: whether it can run is asked anew
 * after every change.
 *
 * What frontends send, command by command, is in attachment_command.c.
 */
#include "attachment_state.h"

#include "kick_watch.h"

/* ---- rings ------------------------------------------------------------- */

void queue_ready(struct queue *q)
{
    if (!q->running)
        return;
    list_remove(&q->ready_link);
    list_append(&q->attachment->engine->ready, &q->ready_link);
}

void queue_set_running(struct queue *q, bool running)
{
    q->running = running;
    if (running)
        queue_ready(q); /* once, without a kick: one may have been lost before */
    else
        list_remove(&q->ready_link);
}

void queue_break(struct queue *q, uint32_t breach)
{
    struct vs_event event = {.kind = VS_EV_QUEUE_BROKEN, .queue = q->index, .reason = breach};
    event.attachment = (uint32_t)(q->attachment - q->attachment->engine->attachment);
    q->broken = breach;
    queue_set_running(q, false);
    bell_ring(q->err);
    mailbox_post(&q->attachment->engine->mailbox, &event);
}

static void notify(struct queue *q)
{
    struct attachment *a = q->attachment;
    if (virtqueue_show_used(&q->vq)) {
        a->engine->notifications++;
        a->engine->queue_stats[q->index].notifications++;
        bell_ring(q->call);
    }
    if (a->dirty_log.changed) {
        a->dirty_log.changed = false;
        bell_ring(a->log_bell);
    }
}

void queues_notify(struct vs_engine *e)
{
    struct list *node;
    while ((node = list_pop(&e->notify)))
        notify(container_of(node, struct queue, notify_link));
}

/* Nothing of it is in flight: what waited for that is answered. */
void queue_quiet(struct queue *q)
{
    struct vs_engine *e = q->attachment->engine;
    if (q->in_flight || (!q->stop_token && !q->disable_token))
        return;
    list_remove(&q->notify_link);
    notify(q); /* the guest sees everything before the frontend hears that the ring is quiet */
    if (q->stop_token)
        mailbox_done(&e->mailbox, q->stop_token, 0, q->base_set ? q->base : virtqueue_base(&q->vq));
    if (q->disable_token)
        mailbox_done(&e->mailbox, q->disable_token, 0, 0);
    q->stop_token = q->disable_token = 0;
    e->quieting--;
}

static bool can_run(const struct queue *q)
{
    return q->started && q->enabled && !q->broken && q->vq.mapped && !q->attachment->closing;
}

static bool attachment_wants_to_run(const struct attachment *a)
{
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++)
        if (a->queue[i].started && a->queue[i].enabled && !a->closing)
            return true;
    return a->in_flight > 0;
}

static void update_rings(struct attachment *a)
{
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++) {
        struct queue *q = &a->queue[i];
        bool run = can_run(q) && a->engine->active == a;
        int rc = 0;
        if (run && q->base_set) {
            rc = virtqueue_start(&q->vq, q->base);
            q->base_set = false;
        }
        if (rc < 0)
            queue_break(q, (uint32_t)-rc);
        else if (run != q->running)
            queue_set_running(q, run);
    }
}

/* Which rings run, after any change of this attachment. */
void attachment_update(struct attachment *a)
{
    struct vs_engine *e = a->engine;
    update_rings(a);
    if (e->active && attachment_wants_to_run(e->active))
        return;
    e->active = NULL;
    for (unsigned i = 0; i < VS_MAX_ATTACHMENTS && !e->active; i++)
        if (e->attachment[i].open && attachment_wants_to_run(&e->attachment[i]))
            e->active = &e->attachment[i];
    if (e->active) {
        e->write_cache = e->active->write_cache;
        update_rings(e->active);
    }
}

/* The ring has come to lie elsewhere, or nothing of it is in flight any more. */
static void forget_old_ring(struct queue *q)
{
    struct mem_table *table = q->leaving;
    q->leaving = NULL;
    if (table)
        mem_table_unpin(&q->attachment->memory, table);
}

/* A ring whose memory is taken away does not run. What was taken up from it before is still answered there, so the
 * memory stays mapped until that is over: the guest may look at it again through another region. */
void attachment_map_rings(struct attachment *a, struct mem_table *mapped_in)
{
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++) {
        struct queue *q = &a->queue[i];
        if (!q->vq.num)
            continue;
        if (virtqueue_map(&q->vq, a->memory.current)) {
            forget_old_ring(q);
        } else if (q->in_flight && virtqueue_answerable(&q->vq)) {
            if (!q->leaving)
                mapped_in->pins++;
            q->leaving = q->leaving ? q->leaving : mapped_in;
        } else {
            virtqueue_unmap(&q->vq);
        }
    }
    attachment_update(a);
}

void attachment_show_done(struct attachment *a)
{
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++) {
        list_remove(&a->queue[i].notify_link);
        notify(&a->queue[i]);
    }
}

/* Nothing of the ring is in flight: its old memory may go. */
static void leave_old_ring(struct queue *q)
{
    if (q->in_flight || !q->leaving)
        return;
    list_remove(&q->notify_link);
    notify(q);
    virtqueue_unmap(&q->vq);
    forget_old_ring(q);
}

/* ---- ends -------------------------------------------------------------- */

static void queue_reset(struct queue *q)
{
    kick_watch_stop(q);
    bell_hang(q->attachment->engine, &q->call, -1);
    bell_hang(q->attachment->engine, &q->err, -1);
    list_remove(&q->ready_link);
    list_remove(&q->notify_link);
    virtqueue_reset(&q->vq);
    q->started = q->enabled = q->running = q->base_set = false;
    q->broken = VS_BREACH_NONE;
}

void attachment_maybe_closed(struct attachment *a)
{
    struct vs_engine *e = a->engine;
    if (!a->closing || a->in_flight)
        return;
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++) {
        notify(&a->queue[i]); /* a frontend that reconnects goes on from the used index */
        queue_quiet(&a->queue[i]);
        queue_reset(&a->queue[i]);
    }
    guest_memory_free(&a->memory);
    inflight_unmap(&a->inflight);
    dirty_log_unmap(&a->dirty_log);
    bell_hang(e, &a->log_bell, -1);
    a->open = a->closing = a->lost = false;
    a->patience_ends_ns = 0;
    a->features = 0;
    mailbox_done(&e->mailbox, a->detach_token, 0, 0);
    attachment_update(a);
}

void queue_finished_one(struct queue *q)
{
    struct attachment *a = q->attachment;
    q->in_flight--;
    a->in_flight--;
    if (list_empty(&q->notify_link))
        list_append(&a->engine->notify, &q->notify_link);
    leave_old_ring(q);
    queue_quiet(q);
    if (a->in_flight)
        return;
    if (a->closing)
        attachment_maybe_closed(a);
    else if (a->engine->active == a && !attachment_wants_to_run(a))
        attachment_update(a);
}

/* ---- beginning and end ------------------------------------------------- */

void attachments_init(struct vs_engine *e)
{
    list_init(&e->ready);
    list_init(&e->stalled);
    list_init(&e->notify);
    list_init(&e->watches);
    for (unsigned i = 0; i < VS_MAX_ATTACHMENTS; i++) {
        struct attachment *a = &e->attachment[i];
        a->engine = e;
        for (unsigned k = 0; k < VS_MAX_QUEUES; k++) {
            struct queue *q = &a->queue[k];
            q->attachment = a;
            q->index = k;
            virtqueue_reset(&q->vq);
            list_init(&q->ready_link);
            list_init(&q->notify_link);
        }
    }
}

void attachments_free(struct vs_engine *e)
{
    kick_watches_free(e);
    for (unsigned i = 0; i < VS_MAX_ATTACHMENTS; i++) {
        struct attachment *a = &e->attachment[i];
        for (unsigned k = 0; a->engine && k < VS_MAX_QUEUES; k++) {
            bell_hang(e, &a->queue[k].call, -1);
            bell_hang(e, &a->queue[k].err, -1);
            forget_old_ring(&a->queue[k]);
            virtqueue_reset(&a->queue[k].vq);
        }
        inflight_unmap(&a->inflight);
        dirty_log_unmap(&a->dirty_log);
        bell_hang(e, &a->log_bell, -1);
        if (a->open)
            guest_memory_free(&a->memory);
    }
}

void attachments_check_memory(struct vs_engine *e)
{
    for (unsigned i = 0; i < VS_MAX_ATTACHMENTS; i++) {
        struct attachment *a = &e->attachment[i];
        struct vs_event event = {.kind = VS_EV_ATTACHMENT_LOST, .attachment = i, .value = VS_LOSS_MEMORY};
        if (!a->open || a->lost)
            continue;
        if (dirty_log_lost(&a->dirty_log))
            event.value = VS_LOSS_DIRTY_LOG;
        else if (!guest_memory_lost(&a->memory) && !inflight_lost(&a->inflight))
            continue;
        a->lost = true;
        for (unsigned k = 0; k < VS_MAX_QUEUES; k++)
            a->queue[k].started = false;
        attachment_update(a);
        mailbox_post(&e->mailbox, &event);
    }
}

/* ---- a frontend that waits ------------------------------------------------ */

static bool waits_for_destination(const struct vs_engine *e, const struct queue *q)
{
    return guest_flush_since_ns(e, q) != UINT64_MAX || read_fallback_waits(e, q) || e->failover.pending;
}

static uint64_t ring_deadline_ns(const struct queue *q)
{
    return q->stop_token || q->disable_token ? q->quiet_deadline_ns : UINT64_MAX;
}

/* Only while somebody waits for the destination does giving it up make a ring quiet. */
static uint64_t destination_deadline_ns(const struct vs_engine *e)
{
    uint64_t deadline = UINT64_MAX;
    if (!e->active || e->quieting == 0)
        return deadline;
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++) {
        const struct queue *q = &e->active->queue[i];
        if (ring_deadline_ns(q) < deadline && waits_for_destination(e, q))
            deadline = ring_deadline_ns(q);
    }
    return deadline;
}

/* How long a pause may hold what is in flight of this ring. */
static uint64_t pause_deadline_ns(const struct queue *q)
{
    uint64_t ring = ring_deadline_ns(q), attachment = q->attachment->patience_ends_ns;
    return attachment && attachment < ring ? attachment : ring;
}

/* A pause must not freeze a whole VM, whose frontend waits for a ring, its end, or memory. */
static void release_paused(struct vs_engine *e)
{
    struct vs_event event = {.kind = VS_EV_PAUSE_RELEASED};
    for (unsigned i = 0; e->mirror.paused && e->active && i < VS_MAX_QUEUES; i++)
        if (pause_deadline_ns(&e->active->queue[i]) <= engine_now(e))
            event.value += guest_flush_release(e, &e->active->queue[i]);
    if (event.value == 0)
        return;
    e->mirror.pause_released += event.value;
    mailbox_post(&e->mailbox, &event);
}

void attachments_check_deadlines(struct vs_engine *e)
{
    if (destination_deadline_ns(e) <= engine_now(e) && destination_attached(&e->destination))
        mirror_degrade(e, VS_REASON_STOP_TIMEOUT, -ETIMEDOUT);
    release_paused(e);
}

uint64_t attachments_deadline_ns(const struct vs_engine *e)
{
    uint64_t deadline = destination_deadline_ns(e);
    for (unsigned i = 0; e->mirror.paused && e->active && i < VS_MAX_QUEUES; i++) {
        const struct queue *q = &e->active->queue[i];
        if (pause_deadline_ns(q) < deadline && guest_flush_paused(e, q))
            deadline = pause_deadline_ns(q);
    }
    return deadline;
}
