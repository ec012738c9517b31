/* SPDX-License-Identifier: Apache-2.0
 *
 * A split virtqueue: descriptor table, available ring, used ring (virtio 1.x, 2.7).
 */
#include <stdatomic.h>
#include <string.h>

#include "shared_memory.h"
#include "virtqueue.h"

/* The event fields behind the rings (virtio 1.x, 2.7.10). */
static uint16_t *used_event(const struct virtqueue *vq)
{
    return &vq->avail->ring[vq->num];
}

static uint16_t *avail_event(const struct virtqueue *vq)
{
    return (uint16_t *)(void *)&vq->used->ring[vq->num];
}

/* After a store to the used ring, event fields included. */
static inline void log_used(const struct virtqueue *vq, const volatile void *field, uint64_t bytes)
{
    if (vq->log)
        dirty_log_mark(vq->log, vq->used_log_addr + (uint64_t)((uintptr_t)field - (uintptr_t)vq->used), bytes);
}

static bool split_map(struct virtqueue *vq, const struct mem_table *table)
{
    uint64_t n = vq->num;
    if (n == 0 || (n & (n - 1)))
        return false;
    /* With the event fields, which are there whether or not they are used. */
    void *desc = guest_at_user(table, vq->desc_user, n * sizeof(struct vring_desc));
    void *avail = guest_at_user(table, vq->avail_user, 4 + 2 * n + 2);
    void *used = guest_at_user(table, vq->used_user, 4 + n * sizeof(struct vring_used_elem) + 2);
    if (!avail) /* a frontend without EVENT_IDX may end its region before them */
        avail = vq->event_idx ? NULL : guest_at_user(table, vq->avail_user, 4 + 2 * n);
    if (!used)
        used = vq->event_idx ? NULL : guest_at_user(table, vq->used_user, 4 + n * sizeof(struct vring_used_elem));
    if (!desc || !avail || !used || (uintptr_t)desc % 16 || (uintptr_t)avail % 2 || (uintptr_t)used % 4)
        return false;
    vq->desc = desc;
    vq->avail = avail;
    vq->used = used;
    return true;
}

static bool split_answerable(const struct virtqueue *vq)
{
    return vq->used != NULL;
}

static void split_unmap(struct virtqueue *vq)
{
    vq->desc = NULL;
    vq->avail = NULL;
    vq->used = NULL;
}

static int split_start(struct virtqueue *vq, uint32_t base)
{
    if (base > UINT16_MAX)
        return -VS_BREACH_AVAILABLE_INDEX;
    vq->next_used = READ_ONCE(vq->used->idx);
    vq->used_shown = vq->next_used;
    vq->again_next = vq->again_count = 0;
    if (vq->record) {
        vq->again_count = inflight_recover(vq->record, vq->num, vq->next_used, vq->again, &vq->inflight_counter);
        /* Also with a record that is new: a process may have died before it began with it, and requests have
         * come since. */
        base = (uint16_t)(vq->next_used + vq->again_count);
        /* A process that was killed may have written there, the index last, and not have come to log it. */
        log_used(vq, vq->used, sizeof *vq->used + vq->num * sizeof vq->used->ring[0]);
    }
    vq->next_avail = (uint16_t)base;
    vq->avail_seen = (uint16_t)base;
    vq->signalled_known = false;
    return 0;
}

static uint32_t split_base(const struct virtqueue *vq)
{
    return vq->next_avail;
}

static int split_peek(struct virtqueue *vq, uint16_t *head)
{
    if (vq->again_next < vq->again_count) {
        *head = vq->again[vq->again_next];
        return 1;
    }
    if (vq->next_avail == vq->avail_seen) {
        uint16_t index = READ_ONCE(vq->avail->idx);
        if ((uint16_t)(index - vq->next_avail) > vq->num)
            return -VS_BREACH_AVAILABLE_INDEX;
        if (index == vq->next_avail)
            return 0;
        vq->avail_seen = index;
        /* The ring entries and descriptors were written before the index (the
         * guest's write barrier); nor may we read them before it. */
        atomic_thread_fence(memory_order_acquire);
    }
    *head = READ_ONCE(vq->avail->ring[vq->next_avail & (vq->num - 1)]);
    return *head < vq->num ? 1 : -VS_BREACH_HEAD;
}

static void split_take(struct virtqueue *vq, uint16_t head)
{
    if (vq->again_next < vq->again_count) {
        vq->again_next++; /* it is recorded already */
        return;
    }
    vq->next_avail++;
    if (vq->record)
        inflight_taken(vq->record, head, vq->inflight_counter++);
}

static void split_chain_begin(struct chain *c, uint16_t head)
{
    c->descs = c->vq->desc;
    c->desc_count = c->left = c->vq->num;
    c->next = head;
    c->in_indirect = c->ended = false;
}

/* Indirect tables may lie at any address, so not by its fields. */
static struct vring_desc read_desc(const struct vring_desc *d)
{
    struct vring_desc copy;
    memcpy(&copy, d, sizeof copy);
    atomic_signal_fence(memory_order_seq_cst); /* the compiler must not read the guest's again in place of the copy */
    return copy;
}

/* An indirect table stands in for the descriptor that names it (2.7.5.3). */
static int enter_indirect(struct chain *c, const struct vring_desc *d)
{
    if (c->in_indirect || !c->vq->indirect || (d->flags & VRING_DESC_F_NEXT))
        return -VS_BREACH_CHAIN;
    return chain_enter_table(c, d->addr, d->len);
}

static int split_chain_next(struct chain *c, struct chain_segment *out)
{
    struct vring_desc d;
    for (;;) {
        if (c->ended)
            return 0;
        if (c->next >= c->desc_count || c->left == 0)
            return -VS_BREACH_CHAIN;
        c->left--;
        d = read_desc((const struct vring_desc *)c->descs + c->next);
        if (!(d.flags & VRING_DESC_F_INDIRECT))
            break;
        int rc = enter_indirect(c, &d);
        if (rc < 0)
            return rc;
    }
    c->ended = !(d.flags & VRING_DESC_F_NEXT);
    c->next = d.next;
    out->addr = d.addr;
    out->len = d.len;
    out->device_writes = d.flags & VRING_DESC_F_WRITE;
    return 1;
}

static void split_push(struct virtqueue *vq, uint16_t head, uint32_t written_bytes)
{
    struct vring_used_elem *e;
    if (!vq->used) /* the frontend took the ring's memory away meanwhile */
        return;
    e = &vq->used->ring[vq->next_used & (vq->num - 1)];
    WRITE_ONCE(e->id, head);
    WRITE_ONCE(e->len, written_bytes);
    log_used(vq, e, sizeof *e);
    vq->next_used++;
    if (vq->record)
        inflight_answered(vq->record, head);
}

static bool split_show_used(struct virtqueue *vq)
{
    uint16_t old = vq->used_signalled, event, count = (uint16_t)(vq->next_used - vq->used_shown);
    if (!vq->used || vq->next_used == vq->used_shown)
        return false;
    /* The elements, status bytes and data before the index that announces them. */
    atomic_thread_fence(memory_order_release);
    WRITE_ONCE(vq->used->idx, vq->next_used);
    log_used(vq, &vq->used->idx, sizeof vq->used->idx);
    vq->used_shown = vq->next_used;
    if (vq->record)
        inflight_batch_done(vq->record, count, vq->used_shown);
    /* The index before the look at what the guest wants: it writes its wish and
     * then looks at the index, so one of us sees the other. */
    atomic_thread_fence(memory_order_seq_cst);
    if (!vq->event_idx)
        return !(READ_ONCE(vq->avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
    vq->used_signalled = vq->used_shown;
    if (!vq->signalled_known) {
        vq->signalled_known = true;
        return true;
    }
    event = READ_ONCE(*used_event(vq));
    return vring_need_event(event, vq->used_shown, old);
}

static bool split_has_more(const struct virtqueue *vq)
{
    return vq->avail && READ_ONCE(vq->avail->idx) != vq->next_avail;
}

static void set_used_flags(struct virtqueue *vq, uint16_t flags)
{
    WRITE_ONCE(vq->used->flags, flags);
    log_used(vq, &vq->used->flags, sizeof vq->used->flags);
}

static bool split_ask_for_kick(struct virtqueue *vq)
{
    if (vq->event_idx) {
        WRITE_ONCE(*avail_event(vq), vq->next_avail);
        log_used(vq, avail_event(vq), sizeof(uint16_t));
    } else {
        set_used_flags(vq, 0);
    }
    /* The wish before the last look: the guest publishes its index, then reads the wish. */
    atomic_thread_fence(memory_order_seq_cst);
    return READ_ONCE(vq->avail->idx) != vq->next_avail;
}

static void split_no_kicks(struct virtqueue *vq)
{
    /* With EVENT_IDX a stale avail_event does that by itself. */
    if (!vq->event_idx)
        set_used_flags(vq, VRING_USED_F_NO_NOTIFY);
}

const struct ring_layout ring_split = {
    .map = split_map,
    .answerable = split_answerable,
    .unmap = split_unmap,
    .start = split_start,
    .base = split_base,
    .peek = split_peek,
    .take = split_take,
    .chain_begin = split_chain_begin,
    .chain_next = split_chain_next,
    .push = split_push,
    .show_used = split_show_used,
    .has_more = split_has_more,
    .ask_for_kick = split_ask_for_kick,
    .no_kicks = split_no_kicks,
};
