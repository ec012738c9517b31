/* SPDX-License-Identifier: Apache-2.0
 *
 * Which rings run. Several attachments may negotiate at once (a local live
 * migration's two sides do), and one of them runs rings: the first whose ring
 * could run becomes the active one, and stays it until none of its rings is
 * started and enabled and none of its requests is in flight.
 *
 * What frontends send here comes in many orders (vhostsync/vhost_user/rules.py lists them), so a
 * ring is not refused for what it lacks yet: whether it can run is asked anew
 * after every change.
 *
 * What frontends send, command by command, is in attachment_command.c.
 */
#include "attachment.h"

/* ---- rings ------------------------------------------------------------- */

void queue_ready(struct queue *q)
{
    if (!q->running)
        return;
    list_remove(&q->ready_link);
    list_append(&q->attachment->frontends->ready, &q->ready_link);
}

void queues_retry(struct frontends *f)
{
    list_splice(&f->ready, &f->stalled);
}

static void kicked(struct kick_target *target)
{
    struct queue *q = container_of(target, struct queue, kick);
    q->attachment->frontends->queue_stats[q->index].kicks++;
    queue_ready(q);
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
    event.attachment = (uint32_t)(q->attachment - q->attachment->frontends->attachment);
    q->broken = breach;
    queue_set_running(q, false);
    bell_ring(q->err);
    mailbox_post(q->attachment->frontends->mailbox, &event);
}

static void notify(struct queue *q)
{
    struct attachment *a = q->attachment;
    if (virtqueue_show_used(&q->vq)) {
        a->frontends->notifications++;
        a->frontends->queue_stats[q->index].notifications++;
        bell_ring(q->call);
    }
    if (a->dirty_log.changed) {
        a->dirty_log.changed = false;
        bell_ring(a->log_bell);
    }
}

void queues_notify(struct frontends *f)
{
    struct list *node;
    while ((node = list_pop(&f->notify)))
        notify(container_of(node, struct queue, notify_link));
}

/* Nothing of it is in flight: what waited for that is answered. */
void queue_quiet(struct queue *q)
{
    struct frontends *f = q->attachment->frontends;
    if (q->in_flight || (!q->stop_token && !q->disable_token))
        return;
    list_remove(&q->notify_link);
    notify(q); /* the guest sees everything before the frontend hears that the ring is quiet */
    if (q->stop_token)
        mailbox_done(f->mailbox, q->stop_token, 0, q->base_set ? q->base : virtqueue_base(&q->vq));
    if (q->disable_token)
        mailbox_done(f->mailbox, q->disable_token, 0, 0);
    q->stop_token = q->disable_token = 0;
    f->quieting--;
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
        bool run = can_run(q) && a->frontends->active == a;
        int rc = 0;
        if (run && q->base_set) {
            rc = virtqueue_start(&q->vq, q->base);
            q->base_set = rc < 0; /* it has not begun, so it goes on from nowhere */
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
    struct frontends *f = a->frontends;
    update_rings(a);
    if (f->active && attachment_wants_to_run(f->active))
        return;
    f->active = NULL;
    for (unsigned i = 0; i < VS_MAX_ATTACHMENTS && !f->active; i++)
        if (f->attachment[i].open && attachment_wants_to_run(&f->attachment[i]))
            f->active = &f->attachment[i];
    if (f->active) {
        f->write_cache = f->active->write_cache;
        update_rings(f->active);
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
    kick_watch_stop(&q->kick);
    bell_hang(&q->attachment->frontends->bells, &q->call, -1);
    bell_hang(&q->attachment->frontends->bells, &q->err, -1);
    list_remove(&q->ready_link);
    list_remove(&q->notify_link);
    virtqueue_reset(&q->vq);
    q->started = q->enabled = q->running = q->base_set = q->limited = false;
    q->broken = VS_BREACH_NONE;
}

void attachment_maybe_closed(struct attachment *a)
{
    struct frontends *f = a->frontends;
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
    bell_hang(&f->bells, &a->log_bell, -1);
    a->open = a->closing = a->lost = false;
    a->patience_ends_ns = 0;
    a->features = 0;
    mailbox_done(f->mailbox, a->detach_token, 0, 0);
    attachment_update(a);
}

void queue_finished_one(struct queue *q)
{
    struct attachment *a = q->attachment;
    q->in_flight--;
    a->in_flight--;
    if (list_empty(&q->notify_link))
        list_append(&a->frontends->notify, &q->notify_link);
    leave_old_ring(q);
    queue_quiet(q);
    if (a->in_flight)
        return;
    if (a->closing)
        attachment_maybe_closed(a);
    else if (a->frontends->active == a && !attachment_wants_to_run(a))
        attachment_update(a);
}

/* ---- beginning and end ------------------------------------------------- */

void frontends_init(struct frontends *f, struct mailbox *mailbox, const struct disk_host *host,
                    const struct vs_engine_config *config)
{
    f->mailbox = mailbox;
    f->host = host;
    f->stop_timeout_ns = config->stop_timeout_us * 1000;
    f->write_cache = f->write_cache_default = config->writeback;
    bells_init(&f->bells);
    kick_watches_init(&f->watches, &f->bells);
    list_init(&f->ready);
    list_init(&f->stalled);
    list_init(&f->notify);
}

void attachment_prepare(struct attachment *a, struct frontends *f)
{
    if (a->frontends)
        return;
    a->frontends = f;
    for (unsigned k = 0; k < VS_MAX_QUEUES; k++) {
        struct queue *q = &a->queue[k];
        q->attachment = a;
        q->index = k;
        q->kick.kicked = kicked;
        virtqueue_reset(&q->vq);
        list_init(&q->ready_link);
        list_init(&q->notify_link);
    }
}

void frontends_free(struct frontends *f)
{
    kick_watches_free(&f->watches);
    for (unsigned i = 0; i < VS_MAX_ATTACHMENTS; i++) {
        struct attachment *a = &f->attachment[i];
        if (!a->frontends)
            continue;
        for (unsigned k = 0; k < VS_MAX_QUEUES; k++) {
            bell_hang(&f->bells, &a->queue[k].call, -1);
            bell_hang(&f->bells, &a->queue[k].err, -1);
            forget_old_ring(&a->queue[k]);
            virtqueue_reset(&a->queue[k].vq);
        }
        inflight_unmap(&a->inflight);
        dirty_log_unmap(&a->dirty_log);
        bell_hang(&f->bells, &a->log_bell, -1);
        if (a->open)
            guest_memory_free(&a->memory);
    }
    bells_free(&f->bells);
}

void attachments_check_memory(struct frontends *f)
{
    for (unsigned i = 0; i < VS_MAX_ATTACHMENTS; i++) {
        struct attachment *a = &f->attachment[i];
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
        mailbox_post(f->mailbox, &event);
    }
}
