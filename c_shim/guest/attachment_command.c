/* SPDX-License-Identifier: Apache-2.0
 *
 * What a frontend asks of its attachment, command by command. Each changes
 * what the attachment or a ring has, and lets attachment.c find out which
 * rings run then. A command is answered at once, or when the ring has become
 * quiet (VRING_STOP, VRING_ENABLE 0), the last request is over (DETACH), or
 * the memory is unmapped (REMOVE_MEM_REGION).
 */
#include "attachment_command.h"

#include <errno.h>
#include <linux/virtio_config.h>
#include <unistd.h>

#define FEATURE_INDIRECT_DESC (1ull << VIRTIO_RING_F_INDIRECT_DESC)
#define FEATURE_EVENT_IDX (1ull << VIRTIO_RING_F_EVENT_IDX)
#define FEATURE_RING_PACKED (1ull << VIRTIO_F_RING_PACKED)

/* ---- coming and going ---------------------------------------------------- */

/* The frontend waits, and the whole VM may be frozen for that long. */
static void lose_patience(struct attachment *a)
{
    a->patience_ends_ns = a->frontends->host->now_ns + a->frontends->stop_timeout_ns;
}

static void detach(struct attachment *a, uint64_t token)
{
    a->closing = true;
    a->detach_token = token;
    lose_patience(a);
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++) {
        kick_watch_stop(&a->queue[i].kick);
        if (a->queue[i].running)
            queue_set_running(&a->queue[i], false);
    }
    attachment_maybe_closed(a);
    if (a->closing)
        attachment_update(a);
}

static void memory_gone(struct guest_memory *m, uint64_t token)
{
    struct attachment *a = container_of(m, struct attachment, memory);
    if (!a->closing)
        a->patience_ends_ns = 0;
    mailbox_done(a->frontends->mailbox, token, 0, 0);
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
    a->write_cache = a->frontends->write_cache;
    a->write_cache_chosen = false;
    return 0;
}

/* ---- rings -------------------------------------------------------------- */

/* The command "token" is answered when nothing of the ring is in flight. A frontend
 * has one such command of a kind under way; a second one takes the first one's place. */
static void become_quiet(struct queue *q, uint64_t *which, uint64_t token)
{
    struct frontends *f = q->attachment->frontends;
    if (!q->stop_token && !q->disable_token)
        f->quieting++;
    if (*which)
        mailbox_done(f->mailbox, *which, -ECANCELED, 0);
    *which = token;
    q->quiet_deadline_ns = f->host->now_ns + f->stop_timeout_ns;
}

/* It begins there, also without SET_VRING_BASE, and its place is looked at as if it had come with one. */
static void begin_where_it_is(struct queue *q)
{
    if (q->base_set)
        return;
    q->base = virtqueue_base(&q->vq); /* what GET_VRING_BASE shows until then */
    q->base_set = true;
}

static int vring_num(struct queue *q, uint64_t num)
{
    if (num == 0 || num > VS_MAX_QUEUE_SIZE || (!virtqueue_is_packed(&q->vq) && (num & (num - 1))))
        return -EINVAL;
    if (num == q->vq.num)
        return 0;
    if (q->running || q->in_flight)
        return -EBUSY;
    q->vq.num = (uint32_t)num;
    begin_where_it_is(q); /* which may lie outside of the ring now */
    attachment_map_rings(q->attachment, q->attachment->memory.current);
    return 0;
}

static int vring_addr(struct queue *q, const struct vs_ring_addresses *ring)
{
    attachment_show_done(q->attachment); /* in the ring of whose elements they are */
    q->vq.desc_user = ring->desc;
    q->vq.avail_user = ring->avail;
    q->vq.used_user = ring->used;
    q->vq.log = ring->log == UINT64_MAX ? NULL : &q->attachment->dirty_log;
    q->vq.used_log_addr = ring->log;
    attachment_map_rings(q->attachment, q->attachment->memory.current);
    return 0;
}

static int vring_base(struct queue *q, uint64_t base)
{
    if (base > (virtqueue_is_packed(&q->vq) ? UINT32_MAX : UINT16_MAX))
        return -EINVAL;
    if (q->running || q->in_flight)
        return -EBUSY;
    q->base = (uint32_t)base;
    q->base_set = true;
    q->broken = VS_BREACH_NONE; /* set up anew */
    attachment_update(q->attachment);
    return 0;
}

static int vring_kick(struct queue *q, int fd)
{
    int rc;
    if (fd < 0)
        return -EINVAL;
    kick_watch_stop(&q->kick);
    rc = kick_watch_start(&q->attachment->frontends->watches, &q->kick, fd);
    if (rc < 0)
        return rc;
    if (!q->started) {
        q->started = true;
        q->broken = VS_BREACH_NONE;
        bell_ring(q->call); /* frontends set CALL first: what was answered before a reconnect was not told */
    }
    attachment_update(q->attachment);
    queue_ready(q);
    return 0;
}

static void vring_call(struct queue *q, int fd)
{
    bell_hang(&q->attachment->frontends->bells, &q->call, fd);
    if (q->started) /* what was completed meanwhile could not be told */
        bell_ring(q->call);
}

static void vring_stop(struct queue *q, uint64_t token)
{
    q->started = false;
    kick_watch_stop(&q->kick);
    become_quiet(q, &q->stop_token, token);
    attachment_update(q->attachment);
    queue_quiet(q);
}

static bool vring_enable(struct queue *q, bool enable, uint64_t token)
{
    q->enabled = enable;
    attachment_update(q->attachment);
    if (enable)
        return true;
    become_quiet(q, &q->disable_token, token);
    queue_quiet(q);
    return false;
}

static void take_write_cache(struct attachment *a, bool write_cache)
{
    a->write_cache = write_cache;
    inflight_keep_write_cache(&a->inflight, write_cache);
}

/* Another attachment that only looks (libblkio probes first) must not change the mode of the guest that runs. But what
 * that guest sets while the receiving side of its migration is connected is the mode that it arrives with there. */
static void set_write_cache(struct attachment *a, bool write_cache)
{
    struct frontends *f = a->frontends;
    a->write_cache_chosen = true;
    take_write_cache(a, write_cache);
    if (f->active && f->active != a)
        return;
    f->write_cache = write_cache;
    for (unsigned i = 0; i < VS_MAX_ATTACHMENTS; i++)
        if (f->attachment[i].open && !f->attachment[i].write_cache_chosen)
            take_write_cache(&f->attachment[i], write_cache);
}

static bool is_busy(const struct attachment *a)
{
    bool busy = a->in_flight > 0;
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++)
        busy |= a->queue[i].running;
    return busy;
}

/* Requests of the rings that this is for must not have begun. Takes up the write cache mode as well. */
static int set_inflight(struct attachment *a, int fd, const struct vs_area *area)
{
    int rc = -EBUSY;
    bool busy = is_busy(a), write_cache = a->write_cache;
    if (busy)
        close(fd);
    else
        rc = inflight_map(&a->inflight, fd, area->bytes, area->offset, area->queues > VS_MAX_QUEUES ? 0 : area->queues,
                          virtqueue_is_packed(&a->queue[0].vq));
    for (unsigned i = 0; !busy && i < VS_MAX_QUEUES; i++) {
        struct queue *q = &a->queue[i];
        q->vq.record = inflight_record(&a->inflight, i);
        if (q->vq.record)
            begin_where_it_is(q); /* or rather where the record says */
    }
    if (rc == 0) {
        inflight_write_cache(&a->inflight, &write_cache);
        if (write_cache == a->write_cache)
            take_write_cache(a, write_cache); /* perhaps the record did not have it */
        else
            set_write_cache(a, write_cache);
    }
    return rc;
}

/* Another layout makes other rings of them: what was recorded of the former ones is none of theirs. */
static int choose_layout(struct attachment *a, bool packed)
{
    int rc = 0;
    if (packed == virtqueue_is_packed(&a->queue[0].vq))
        return 0;
    if (is_busy(a))
        return -EBUSY;
    inflight_unmap(&a->inflight);
    for (unsigned i = 0; rc == 0 && i < VS_MAX_QUEUES; i++)
        rc = virtqueue_choose_layout(&a->queue[i].vq, packed);
    for (unsigned i = 0; rc < 0 && i < VS_MAX_QUEUES; i++)
        (void)virtqueue_choose_layout(&a->queue[i].vq, false); /* all alike: that takes no memory */
    return rc;
}

static int set_features(struct attachment *a, uint64_t features)
{
    bool event_idx = features & FEATURE_EVENT_IDX;
    int rc = choose_layout(a, features & FEATURE_RING_PACKED);
    if (rc < 0)
        return rc;
    a->features = features;
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++) {
        struct virtqueue *vq = &a->queue[i].vq;
        vq->indirect = features & FEATURE_INDIRECT_DESC;
        if (vq->event_idx != event_idx)
            vq->signalled_known = false;
        vq->event_idx = event_idx;
    }
    attachment_map_rings(a, a->memory.current); /* the event fields belong to the rings now, or no more */
    return 0;
}

static bool another_is_attached(const struct attachment *a)
{
    for (unsigned i = 0; i < VS_MAX_ATTACHMENTS; i++) {
        const struct attachment *other = &a->frontends->attachment[i];
        if (other != a && other->open && !other->closing)
            return true;
    }
    return false;
}

/* QEMU 10 resets a device when it makes it, also on the receiving side of a live migration: that guest comes with the
 * mode that it has set on the other side, and would not flush what the default leaves to it. */
static void reset_device(struct attachment *a)
{
    a->features = 0;
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++)
        a->queue[i].vq.log = NULL;
    if (!another_is_attached(a))
        set_write_cache(a, a->frontends->write_cache_default);
    a->write_cache_chosen = false;
}

/* Done at once (true, with *rc), or answered later (false). */
static bool apply_vring(struct queue *q, uint64_t token, const struct vs_command *c, int *rc)
{
    switch (c->kind) {
    case VS_CMD_VRING_NUM:
        *rc = vring_num(q, c->value);
        return true;
    case VS_CMD_VRING_ADDR:
        *rc = vring_addr(q, &c->ring);
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
        bell_hang(&q->attachment->frontends->bells, &q->err, c->fd);
        return true;
    case VS_CMD_VRING_ENABLE:
        return vring_enable(q, c->value, token);
    default:
        vring_stop(q, token);
        return false;
    }
}

static bool change_memory(struct attachment *a, uint64_t token, const struct vs_command *c, int *rc)
{
    if (c->kind == VS_CMD_SET_MEM_TABLE) {
        *rc = guest_memory_set(&a->memory, c->memory.region, c->memory.count);
    } else if (c->kind == VS_CMD_ADD_MEM_REGION) {
        *rc = guest_memory_add(&a->memory, &c->memory.region[0]);
    } else {
        lose_patience(a);
        *rc = guest_memory_remove(&a->memory, &c->memory.region[0], token);
        if (*rc == 0)
            return false; /* memory_gone() answers */
        a->patience_ends_ns = 0;
    }
    return true;
}

static bool apply_memory(struct attachment *a, uint64_t token, const struct vs_command *c, int *rc)
{
    struct mem_table *before = mem_table_pin(&a->memory);
    bool done;
    attachment_show_done(a);
    done = change_memory(a, token, c, rc);
    if (*rc == 0)
        attachment_map_rings(a, before);
    mem_table_unpin(&a->memory, before);
    return done;
}

static void close_fds(struct bells *b, const struct vs_command *c)
{
    if (c->fd >= 0)
        close_foreign_fd(b, c->fd);
    for (uint32_t i = 0; command_has_memory(c) && i < c->memory.count && i < VS_MEM_TABLE_REGIONS; i++)
        if (c->memory.region[i].fd >= 0)
            close_foreign_fd(b, c->memory.region[i].fd);
}

void attachment_command(struct frontends *f, uint64_t token, const struct vs_command *c)
{
    struct attachment *a = &f->attachment[c->attachment < VS_MAX_ATTACHMENTS ? c->attachment : 0];
    int rc = 0;
    bool done = true;
    if (c->attachment >= VS_MAX_ATTACHMENTS || c->queue >= VS_MAX_QUEUES ||
        (c->kind != VS_CMD_ATTACH && (!a->open || a->closing))) {
        close_fds(&f->bells, c);
        rc = -EINVAL;
    } else {
        switch (c->kind) {
        case VS_CMD_ATTACH:
            attachment_prepare(a, f);
            rc = attach(a);
            break;
        case VS_CMD_DETACH:
            detach(a, token);
            done = false;
            break;
        case VS_CMD_RESET:
            reset_device(a);
            mailbox_done(f->mailbox, token, 0, a->write_cache);
            done = false;
            break;
        case VS_CMD_SET_INFLIGHT:
            rc = set_inflight(a, c->fd, &c->area);
            mailbox_done(f->mailbox, token, rc, a->write_cache);
            done = false;
            break;
        case VS_CMD_SET_FEATURES:
            rc = set_features(a, c->value);
            break;
        case VS_CMD_SET_LOG_BASE:
            rc = dirty_log_map(&a->dirty_log, c->fd, c->area.bytes, c->area.offset);
            break;
        case VS_CMD_SET_LOG_FD:
            bell_hang(&f->bells, &a->log_bell, c->fd);
            break;
        case VS_CMD_GET_WRITE_CACHE:
            mailbox_done(f->mailbox, token, 0, a->write_cache);
            done = false;
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
        mailbox_done(f->mailbox, token, rc, 0);
}
