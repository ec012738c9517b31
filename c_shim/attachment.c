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
 */
#include "attachment.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "kick_watch.h"
#include "request_path.h"

#define FEATURE_INDIRECT_DESC (1ull << VIRTIO_RING_F_INDIRECT_DESC)
#define FEATURE_EVENT_IDX (1ull << VIRTIO_RING_F_EVENT_IDX)

static void update(struct attachment *a);

/* ---- rings ------------------------------------------------------------- */

static void set_fd(int *fd, int to)
{
    if (*fd >= 0)
        close(*fd);
    *fd = to;
    if (to >= 0) /* a full call descriptor must not stop us: frontends hand over blocking ones */
        (void)fcntl(to, F_SETFL, fcntl(to, F_GETFL) | O_NONBLOCK);
}

static void signal_fd(int fd)
{
    uint64_t one = 1;
    if (fd >= 0 && write(fd, &one, sizeof one) < 0) {
        /* EAGAIN: enough notifications wait there already. EPIPE and the like:
         * the frontend is gone, which its socket tells. */
    }
}

void queue_ready(struct queue *q)
{
    if (!q->running)
        return;
    list_remove(&q->ready_link);
    list_append(&q->attachment->engine->ready, &q->ready_link);
}

static void set_running(struct queue *q, bool running)
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
    set_running(q, false);
    signal_fd(q->err_fd);
    mailbox_post(&q->attachment->engine->mailbox, &event);
}

static void notify(struct queue *q)
{
    if (virtqueue_show_used(&q->vq)) {
        q->attachment->engine->notifications++;
        q->attachment->engine->queue_stats[q->index].notifications++;
        signal_fd(q->call_fd);
    }
}

void queues_notify(struct vs_engine *e)
{
    struct list *node;
    while ((node = list_pop(&e->notify)))
        notify(container_of(node, struct queue, notify_link));
}

/* Nothing of it is in flight: what waited for that is answered. */
static void queue_quiet(struct queue *q)
{
    struct vs_engine *e = q->attachment->engine;
    if (q->in_flight || (!q->stop_token && !q->disable_token))
        return;
    list_remove(&q->notify_link);
    notify(q); /* the guest sees everything before the frontend hears that the ring is quiet */
    if (q->stop_token)
        mailbox_done(&e->mailbox, q->stop_token, 0, q->base_set ? q->base : q->vq.next_avail);
    if (q->disable_token)
        mailbox_done(&e->mailbox, q->disable_token, 0, 0);
    q->stop_token = q->disable_token = 0;
    e->quieting--;
}

static bool can_run(const struct queue *q)
{
    return q->started && q->enabled && !q->broken && q->vq.desc && !q->attachment->closing;
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
        if (run && q->base_set) {
            virtqueue_start(&q->vq, q->base);
            q->base_set = false;
        }
        if (run != q->running)
            set_running(q, run);
    }
}

/* Which rings run, after any change of this attachment. */
static void update(struct attachment *a)
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

static void map_rings(struct attachment *a)
{
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++) {
        struct queue *q = &a->queue[i];
        if (q->vq.num && !virtqueue_map(&q->vq, a->memory.current))
            virtqueue_unmap(&q->vq);
    }
    update(a);
}

/* ---- ends -------------------------------------------------------------- */

static void queue_reset(struct queue *q)
{
    kick_watch_stop(q);
    set_fd(&q->call_fd, -1);
    set_fd(&q->err_fd, -1);
    list_remove(&q->ready_link);
    list_remove(&q->notify_link);
    q->vq = (struct virtqueue){0};
    q->started = q->enabled = q->running = q->base_set = false;
    q->broken = VS_BREACH_NONE;
}

static void maybe_closed(struct attachment *a)
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
    a->open = a->closing = a->lost = false;
    a->features = 0;
    mailbox_done(&e->mailbox, a->detach_token, 0, 0);
    update(a);
}

void queue_finished_one(struct queue *q)
{
    struct attachment *a = q->attachment;
    q->in_flight--;
    a->in_flight--;
    if (list_empty(&q->notify_link))
        list_append(&a->engine->notify, &q->notify_link);
    queue_quiet(q);
    if (a->in_flight)
        return;
    if (a->closing)
        maybe_closed(a);
    else if (a->engine->active == a && !attachment_wants_to_run(a))
        update(a);
}

static void detach(struct attachment *a, uint64_t token)
{
    a->closing = true;
    a->detach_token = token;
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++) {
        kick_watch_stop(&a->queue[i]);
        if (a->queue[i].running)
            set_running(&a->queue[i], false);
    }
    maybe_closed(a);
    if (a->closing)
        update(a);
}

static void memory_gone(struct guest_memory *m, uint64_t token)
{
    struct attachment *a = container_of(m, struct attachment, memory);
    mailbox_done(&a->engine->mailbox, token, 0, 0);
}

static int attach(struct attachment *a)
{
    int rc;
    if (a->open)
        return -EBUSY;
    rc = guest_memory_init(&a->memory, memory_gone);
    if (rc < 0)
        return rc;
    a->open = true;
    a->write_cache = a->engine->write_cache;
    return 0;
}

/* ---- commands ---------------------------------------------------------- */

/* The command "token" is answered when nothing of the ring is in flight. A frontend
 * has one such command of a kind under way; a second one takes the first one's place. */
static void become_quiet(struct queue *q, uint64_t *which, uint64_t token)
{
    struct vs_engine *e = q->attachment->engine;
    if (!q->stop_token && !q->disable_token)
        e->quieting++;
    if (*which)
        mailbox_done(&e->mailbox, *which, -ECANCELED, 0);
    *which = token;
    q->quiet_deadline_ns = engine_now(e) + e->config.stop_timeout_us * 1000;
}

static int vring_num(struct queue *q, uint64_t num)
{
    if (num == 0 || num > VS_MAX_QUEUE_SIZE || (num & (num - 1)))
        return -EINVAL;
    if (num == q->vq.num)
        return 0;
    if (q->running || q->in_flight)
        return -EBUSY;
    q->vq.num = (uint32_t)num;
    map_rings(q->attachment);
    return 0;
}

static int vring_addr(struct queue *q, const struct vs_command *c)
{
    q->vq.desc_user = c->desc;
    q->vq.avail_user = c->avail;
    q->vq.used_user = c->used;
    map_rings(q->attachment);
    return 0;
}

static int vring_base(struct queue *q, uint64_t base)
{
    if (base > UINT16_MAX)
        return -EINVAL;
    if (q->running || q->in_flight)
        return -EBUSY;
    q->base = (uint16_t)base;
    q->base_set = true;
    q->broken = VS_BREACH_NONE; /* set up anew */
    update(q->attachment);
    return 0;
}

static int vring_kick(struct queue *q, int fd)
{
    int rc;
    if (fd < 0)
        return -EINVAL;
    kick_watch_stop(q);
    rc = kick_watch_start(q, fd);
    if (rc < 0)
        return rc;
    if (!q->started) {
        q->started = true;
        q->broken = VS_BREACH_NONE;
        signal_fd(q->call_fd); /* frontends set CALL first: what was answered before a reconnect was not told */
    }
    update(q->attachment);
    queue_ready(q);
    return 0;
}

static void vring_call(struct queue *q, int fd)
{
    set_fd(&q->call_fd, fd);
    if (fd >= 0 && q->started) /* what was completed meanwhile could not be told */
        signal_fd(fd);
}

static void vring_stop(struct queue *q, uint64_t token)
{
    q->started = false;
    kick_watch_stop(q);
    become_quiet(q, &q->stop_token, token);
    update(q->attachment);
    queue_quiet(q);
}

static bool vring_enable(struct queue *q, bool enable, uint64_t token)
{
    q->enabled = enable;
    update(q->attachment);
    if (enable)
        return true;
    become_quiet(q, &q->disable_token, token);
    queue_quiet(q);
    return false;
}

/* Another attachment that only looks (libblkio probes first) must not change the mode of the guest that runs. */
static void set_write_cache(struct attachment *a, bool write_cache)
{
    a->write_cache = write_cache;
    inflight_keep_write_cache(&a->inflight, write_cache);
    if (!a->engine->active || a->engine->active == a)
        a->engine->write_cache = write_cache;
}

/* Requests of the rings that this is for must not have begun. Takes up the write cache mode as well. */
static int set_inflight(struct attachment *a, const struct vs_command *c)
{
    int rc = -EBUSY;
    bool busy = a->in_flight > 0, write_cache = a->write_cache;
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++)
        busy |= a->queue[i].running;
    if (busy)
        close(c->fd);
    else
        rc = inflight_map(&a->inflight, c->fd, c->value, c->desc, c->used > VS_MAX_QUEUES ? 0 : (uint32_t)c->used);
    for (unsigned i = 0; !busy && i < VS_MAX_QUEUES; i++) {
        struct queue *q = &a->queue[i];
        q->vq.inflight = inflight_ring_of(&a->inflight, i);
        if (!q->vq.inflight || q->base_set)
            continue;
        q->base = q->vq.next_avail; /* what GET_VRING_BASE shows until then */
        q->base_set = true; /* begin where the record says, also without a base */
    }
    if (rc == 0) {
        inflight_write_cache(&a->inflight, &write_cache);
        set_write_cache(a, write_cache);
    }
    return rc;
}

static void set_features(struct attachment *a, uint64_t features)
{
    bool event_idx = features & FEATURE_EVENT_IDX;
    a->features = features;
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++) {
        struct virtqueue *vq = &a->queue[i].vq;
        vq->indirect = features & FEATURE_INDIRECT_DESC;
        if (vq->event_idx != event_idx)
            vq->signalled_known = false;
        vq->event_idx = event_idx;
    }
    map_rings(a); /* the event fields belong to the rings now, or no more */
}

static void reset_device(struct attachment *a)
{
    a->features = 0;
    set_write_cache(a, a->engine->config.writeback);
}

/* Done at once (true, with *rc), or answered later (false). */
static bool apply_vring(struct queue *q, uint64_t token, const struct vs_command *c, int *rc)
{
    switch (c->kind) {
    case VS_CMD_VRING_NUM:
        *rc = vring_num(q, c->value);
        return true;
    case VS_CMD_VRING_ADDR:
        *rc = vring_addr(q, c);
        return true;
    case VS_CMD_VRING_BASE:
        *rc = vring_base(q, c->value);
        return true;
    case VS_CMD_VRING_KICK:
        *rc = vring_kick(q, c->fd);
        return true;
    case VS_CMD_VRING_CALL:
        vring_call(q, c->fd);
        return true;
    case VS_CMD_VRING_ERR:
        set_fd(&q->err_fd, c->fd);
        return true;
    case VS_CMD_VRING_ENABLE:
        return vring_enable(q, c->value, token);
    default:
        vring_stop(q, token);
        return false;
    }
}

static bool apply_memory(struct attachment *a, uint64_t token, const struct vs_command *c, int *rc)
{
    if (c->kind == VS_CMD_SET_MEM_TABLE) {
        *rc = guest_memory_set(&a->memory, c->regions, c->region_count);
    } else if (c->kind == VS_CMD_ADD_MEM_REGION) {
        *rc = guest_memory_add(&a->memory, &c->regions[0]);
    } else {
        *rc = guest_memory_remove(&a->memory, &c->regions[0], token);
        if (*rc == 0) {
            map_rings(a);
            return false; /* memory_gone() answers */
        }
    }
    if (*rc == 0)
        map_rings(a);
    return true;
}

void attachment_command(struct vs_engine *e, uint64_t token, const struct vs_command *c)
{
    struct attachment *a = &e->attachment[c->attachment < VS_MAX_ATTACHMENTS ? c->attachment : 0];
    int rc = 0;
    bool done = true;
    if (c->attachment >= VS_MAX_ATTACHMENTS || c->queue >= VS_MAX_QUEUES ||
        (c->kind != VS_CMD_ATTACH && (!a->open || a->closing))) {
        command_close_fds(c);
        rc = -EINVAL;
    } else {
        switch (c->kind) {
        case VS_CMD_ATTACH:
            rc = attach(a);
            break;
        case VS_CMD_DETACH:
            detach(a, token);
            done = false;
            break;
        case VS_CMD_RESET:
            reset_device(a);
            break;
        case VS_CMD_SET_INFLIGHT:
            rc = set_inflight(a, c);
            mailbox_done(&e->mailbox, token, rc, a->write_cache);
            done = false;
            break;
        case VS_CMD_SET_FEATURES:
            set_features(a, c->value);
            break;
        case VS_CMD_SET_WRITE_CACHE:
            set_write_cache(a, c->value);
            break;
        case VS_CMD_SET_MEM_TABLE:
        case VS_CMD_ADD_MEM_REGION:
        case VS_CMD_REMOVE_MEM_REGION:
            done = apply_memory(a, token, c, &rc);
            break;
        default:
            done = apply_vring(&a->queue[c->queue], token, c, &rc);
        }
    }
    if (done)
        mailbox_done(&e->mailbox, token, rc, 0);
}

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
            q->call_fd = q->err_fd = -1;
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
            set_fd(&a->queue[k].call_fd, -1);
            set_fd(&a->queue[k].err_fd, -1);
        }
        inflight_unmap(&a->inflight);
        if (a->open)
            guest_memory_free(&a->memory);
    }
}

void attachments_check_memory(struct vs_engine *e)
{
    for (unsigned i = 0; i < VS_MAX_ATTACHMENTS; i++) {
        struct attachment *a = &e->attachment[i];
        struct vs_event event = {.kind = VS_EV_ATTACHMENT_LOST, .attachment = i};
        if (!a->open || a->lost || !(guest_memory_lost(&a->memory) || inflight_lost(&a->inflight)))
            continue;
        a->lost = true;
        for (unsigned k = 0; k < VS_MAX_QUEUES; k++)
            a->queue[k].started = false;
        update(a);
        mailbox_post(&e->mailbox, &event);
    }
}

void attachments_check_deadlines(struct vs_engine *e)
{
    if (attachments_deadline_ns(e) <= engine_now(e) && mirror_attached(&e->mirror))
        mirror_degrade(e, VS_REASON_STOP_TIMEOUT, -ETIMEDOUT);
}

/* Only while somebody waits for the destination does giving it up make a ring quiet. */
uint64_t attachments_deadline_ns(const struct vs_engine *e)
{
    uint64_t deadline = UINT64_MAX;
    const struct attachment *a = e->active;
    if (!a || e->quieting == 0)
        return deadline;
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++) {
        const struct queue *q = &a->queue[i];
        if ((q->stop_token || q->disable_token) && q->quiet_deadline_ns < deadline &&
            guest_flush_since_ns(e, q) != UINT64_MAX)
            deadline = q->quiet_deadline_ns;
    }
    return deadline;
}
