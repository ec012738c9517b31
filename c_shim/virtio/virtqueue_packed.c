/* SPDX-License-Identifier: Apache-2.0
 *
 * A packed virtqueue: one ring of descriptors, which the guest makes available
 * and which are overwritten with used elements (virtio 1.x, 2.8).
 *
 * A side's place in the ring is an index and a wrap counter, which turns over
 * each time the index passes the end. A descriptor is available if its AVAIL bit
 * is the guest's wrap counter and its USED bit is not; used if both are ours.
 *
 * Used elements overwrite descriptors of chains that are still at work, so a
 * chain's descriptors are copied out of the ring when it is looked at, once, and
 * everything later works with the copy.
 *
 * What the ring can be made to do is bounded by these, whatever the guest writes:
 *   - the descriptors taken up and not yet shown as used are never more than the
 *     ring has (a chain that would need more breaks the ring), so no used element
 *     overtakes what is available;
 *   - a buffer ID is less than the ring's size, and is in flight at most once, so
 *     by_id has a place for each.
 */
#include <stdlib.h>
#include <string.h>

#include "inflight_packed.h"
#include "shared_memory.h"
#include "virtqueue.h"

#define AVAIL (1u << VRING_PACKED_DESC_F_AVAIL)
#define USED (1u << VRING_PACKED_DESC_F_USED)

/* The chain that a buffer ID stands for, from take until its used element is shown. */
struct packed_chain {
    uint16_t descs; /* 0: it is not in flight */
    uint16_t next_in_batch;
    uint16_t entry, last; /* in the record */
};

struct packed_ring {
    /* Mapped; they stay after virtqueue_map() has failed, for answers. */
    struct vring_packed_desc *desc;
    struct vring_packed_desc_event *driver, *device;
    uint64_t desc_guest_addr;
    uint16_t next_avail, next_used; /* places: an index, with the wrap counter in bit 15 */
    uint16_t in_flight;             /* descriptors taken up and not shown as used */
    /* Used elements that were written since the last were shown. */
    uint16_t batch_descs, batch_chains, batch_first, batch_flags;
    uint16_t batch_index; /* where the first of them lies, whose flags show them all */
    /* The chain that was looked at last: what take() and the walk are about. */
    uint16_t seen_count;
    struct inflight_packed_state record;
    struct packed_chain by_id[VS_MAX_QUEUE_SIZE];
    struct vring_packed_desc seen[VS_MAX_QUEUE_SIZE];
    struct inflight_packed_chain again[VS_MAX_QUEUE_SIZE];
};

/* ---- places -------------------------------------------------------------- */

static inline uint16_t index_of(uint16_t place)
{
    return place & (PACKED_WRAP - 1);
}

static inline bool wrap_of(uint16_t place)
{
    return place & PACKED_WRAP;
}

/* steps <= num */
static inline uint16_t advance(const struct virtqueue *vq, uint16_t place, uint32_t steps)
{
    uint32_t index = index_of(place) + steps;
    if (index < vq->num)
        return (uint16_t)(place + steps);
    return (uint16_t)((index - vq->num) | (wrap_of(place) ? 0 : PACKED_WRAP));
}

static inline bool is_available(uint16_t flags, uint16_t place)
{
    return !!(flags & AVAIL) == wrap_of(place) && !!(flags & USED) != wrap_of(place);
}

static bool packed_map(struct virtqueue *vq, const struct mem_table *table)
{
    struct packed_ring *p = vq->packed;
    uint64_t bytes = vq->num * sizeof(struct vring_packed_desc);
    if (vq->num == 0)
        return false;
    void *desc = guest_at_user(table, vq->desc_user, bytes);
    void *driver = guest_at_user(table, vq->avail_user, sizeof(struct vring_packed_desc_event));
    void *device = guest_at_user(table, vq->used_user, sizeof(struct vring_packed_desc_event));
    if (!desc || !driver || !device || (uintptr_t)desc % 16 || (uintptr_t)driver % 4 || (uintptr_t)device % 4)
        return false;
    p->desc = desc;
    p->driver = driver;
    p->device = device;
    /* SET_VRING_ADDR tells where the device's event suppression is logged, and used elements are not written there. */
    p->desc_guest_addr = guest_addr_of(table, desc);
    return true;
}

static bool packed_answerable(const struct virtqueue *vq)
{
    return vq->packed->desc != NULL;
}

static void packed_unmap(struct virtqueue *vq)
{
    vq->packed->desc = NULL;
    vq->packed->driver = NULL;
    vq->packed->device = NULL;
}

/* ---- the start ------------------------------------------------------------ */

static void log_elements(const struct virtqueue *vq, uint16_t first, uint32_t count)
{
    if (vq->log)
        dirty_log_mark(vq->log, vq->packed->desc_guest_addr + first * sizeof(struct vring_packed_desc),
                       count * sizeof(struct vring_packed_desc));
}

/* A process that died amid a batch may have written used elements, flags and all, behind the first one, which it has
 * not shown. Once another one is shown there, the guest would come to them and take them for this process's, whose next
 * element it then misses. So what is at work looks again as the guest has made it available. The first place does: its
 * flags show a batch, and are written last. The guest looks no further, and needs nothing else of these descriptors. */
static void hide_former_elements(struct virtqueue *vq)
{
    struct packed_ring *p = vq->packed;
    for (uint32_t i = 1; i < p->in_flight; i++) {
        uint16_t place = advance(vq, p->next_used, i);
        WRITE_ONCE(p->desc[index_of(place)].flags, (uint16_t)(wrap_of(place) ? AVAIL : USED));
    }
}

/* What a former process has taken up keeps its buffer IDs and its descriptors. 0 or minus an enum vs_breach. */
static int take_again(struct virtqueue *vq)
{
    struct packed_ring *p = vq->packed;
    int count = inflight_packed_recover(vq->record, &p->record, vq->num, p->desc, &p->next_used, p->again);
    if (count < 0)
        return -VS_BREACH_CHAIN;
    for (int i = 0; i < count; i++) {
        const struct inflight_packed_chain *c = &p->again[i];
        if (p->by_id[c->id].descs)
            return -VS_BREACH_HEAD;
        p->by_id[c->id] = (struct packed_chain){.descs = c->num, .entry = c->entry, .last = c->last};
        p->in_flight = (uint16_t)(p->in_flight + c->num);
    }
    vq->again_count = (uint32_t)count;
    /* Also if there are none: a frontend whose backend died knows no base of a packed ring. */
    p->next_avail = advance(vq, p->next_used, p->in_flight);
    hide_former_elements(vq);
    log_elements(vq, 0, vq->num); /* also what that process has written and did not come to log */
    return 0;
}

/* As SET_VRING_BASE has it: where to look for the next available descriptor. Above it frontends may tell where the next
 * used element goes. Nothing is in flight (what is, the record knows), so that is the same place, and it is not asked
 * which frontends leave it out, or keep it up to date. */
static int packed_start(struct virtqueue *vq, uint32_t base)
{
    struct packed_ring *p = vq->packed;
    p->next_avail = (uint16_t)base;
    p->next_used = p->next_avail;
    if (index_of(p->next_avail) >= vq->num)
        return -VS_BREACH_AVAILABLE_INDEX;
    p->in_flight = 0;
    p->batch_descs = p->batch_chains = p->seen_count = 0;
    memset(p->by_id, 0, sizeof p->by_id);
    vq->again_next = vq->again_count = 0;
    vq->signalled_known = false;
    return vq->record ? take_again(vq) : 0;
}

static uint32_t packed_base(const struct virtqueue *vq)
{
    return vq->packed->next_avail | (uint32_t)vq->packed->next_used << 16;
}

/* ---- chains ----------------------------------------------------------------- */

/* Copies the chain at the ring's head, whose flags were read. 1 or minus an enum vs_breach. */
static int look_at_chain(const struct virtqueue *vq, uint16_t flags)
{
    struct packed_ring *p = vq->packed;
    uint32_t at = index_of(p->next_avail), room = vq->num - p->in_flight, count = 0;
    if (room == 0)
        return -VS_BREACH_AVAILABLE_INDEX;
    for (;;) {
        const struct vring_packed_desc *d = &p->desc[at];
        p->seen[count] = (struct vring_packed_desc){
            .addr = READ_ONCE(d->addr), .len = READ_ONCE(d->len), .id = READ_ONCE(d->id), .flags = flags};
        count++;
        if (!(flags & VRING_DESC_F_NEXT))
            break;
        if (count == room) /* no loop, and nothing that is not used yet */
            return -VS_BREACH_CHAIN;
        at = at + 1 < vq->num ? at + 1 : 0;
        flags = READ_ONCE(p->desc[at].flags); /* the guest has written these before the head's */
    }
    p->seen_count = (uint16_t)count;
    return 1;
}

static void look_at_record(struct virtqueue *vq, const struct inflight_packed_chain *c)
{
    struct packed_ring *p = vq->packed;
    uint16_t at = c->entry;
    for (uint16_t i = 0; i < c->num; i++, at = p->record.next[at])
        p->seen[i] = inflight_packed_desc_at(vq->record, at);
    p->seen_count = c->num;
}

static int packed_peek(struct virtqueue *vq, uint16_t *chain)
{
    struct packed_ring *p = vq->packed;
    uint16_t flags;
    int rc;
    if (vq->again_next < vq->again_count) {
        look_at_record(vq, &p->again[vq->again_next]);
        *chain = p->again[vq->again_next].id;
        return 1;
    }
    flags = READ_ONCE(p->desc[index_of(p->next_avail)].flags);
    if (!is_available(flags, p->next_avail))
        return 0;
    /* The rest of the descriptor and the chain behind it were written before the head's flags (the guest's write
     * barrier); nor may we read them before those. */
    atomic_thread_fence(memory_order_acquire);
    rc = look_at_chain(vq, flags);
    if (rc < 0)
        return rc;
    *chain = p->seen[p->seen_count - 1].id; /* a list's ID is in its last descriptor */
    return *chain < vq->num && !p->by_id[*chain].descs ? 1 : -VS_BREACH_HEAD;
}

static void packed_take(struct virtqueue *vq, uint16_t chain)
{
    struct packed_ring *p = vq->packed;
    struct packed_chain *c = &p->by_id[chain];
    if (vq->again_next < vq->again_count) {
        vq->again_next++; /* it is recorded already */
        return;
    }
    c->descs = p->seen_count;
    p->in_flight = (uint16_t)(p->in_flight + c->descs);
    p->next_avail = advance(vq, p->next_avail, c->descs);
    if (vq->record)
        c->entry = inflight_packed_taken(vq->record, &p->record, c->descs, p->seen, &c->last);
}

static void packed_chain_begin(struct chain *c, uint16_t chain)
{
    (void)chain; /* the one that peek has copied */
    c->descs = c->vq->packed->seen;
    c->desc_count = c->left = c->vq->packed->seen_count;
    c->next = 0;
    c->in_indirect = c->ended = false;
}

/* An indirect table stands in for the one descriptor of its list, and each of its descriptors counts (2.8.7). */
static int enter_indirect(struct chain *c, const struct vring_packed_desc *d)
{
    if (!c->vq->indirect || c->desc_count != 1)
        return -VS_BREACH_CHAIN;
    return chain_enter_table(c, d->addr, d->len);
}

static int packed_chain_next(struct chain *c, struct chain_segment *out)
{
    struct vring_packed_desc d;
    for (;;) {
        if (c->left == 0)
            return 0;
        c->left--;
        /* An indirect table may lie at any address, so not by its fields. */
        memcpy(&d, (const struct vring_packed_desc *)c->descs + c->next++, sizeof d);
        in_program_order(); /* the compiler must not read the guest's again in place of the copy */
        if (c->in_indirect || !(d.flags & VRING_DESC_F_INDIRECT))
            break;
        int rc = enter_indirect(c, &d);
        if (rc < 0)
            return rc;
    }
    out->addr = d.addr;
    out->len = d.len;
    out->device_writes = d.flags & VRING_DESC_F_WRITE;
    return 1;
}

/* ---- answers ---------------------------------------------------------------- */

static void packed_push(struct virtqueue *vq, uint16_t chain, uint32_t written_bytes)
{
    struct packed_ring *p = vq->packed;
    struct packed_chain *c = &p->by_id[chain];
    uint16_t index = index_of(p->next_used);
    uint16_t flags = (uint16_t)(VRING_DESC_F_WRITE | (wrap_of(p->next_used) ? AVAIL | USED : 0));
    if (!p->desc) /* the frontend took the ring's memory away meanwhile */
        return;
    WRITE_ONCE(p->desc[index].id, chain);
    WRITE_ONCE(p->desc[index].len, written_bytes);
    if (p->batch_chains == 0) { /* the guest looks no further before this one is used */
        p->batch_index = index;
        p->batch_flags = flags;
    } else {
        WRITE_ONCE(p->desc[index].flags, flags);
    }
    log_elements(vq, index, 1);
    c->next_in_batch = p->batch_first;
    p->batch_first = chain;
    p->batch_chains++;
    p->batch_descs = (uint16_t)(p->batch_descs + c->descs);
    p->next_used = advance(vq, p->next_used, c->descs);
}

/* The record before the batch is shown: a process that dies in between has not shown it. */
static void record_batch(struct virtqueue *vq)
{
    struct packed_ring *p = vq->packed;
    uint16_t id = p->batch_first;
    for (uint16_t i = 0; i < p->batch_chains; i++, id = p->by_id[id].next_in_batch)
        inflight_packed_answered(vq->record, &p->record, p->by_id[id].entry, p->by_id[id].last);
    inflight_packed_showing(vq->record, &p->record, p->next_used);
}

static void forget_batch(struct virtqueue *vq)
{
    struct packed_ring *p = vq->packed;
    uint16_t id = p->batch_first;
    for (uint16_t i = 0; i < p->batch_chains; i++, id = p->by_id[id].next_in_batch) {
        if (vq->record)
            inflight_packed_cleared(vq->record, p->by_id[id].entry);
        p->by_id[id].descs = 0;
    }
    if (vq->record)
        inflight_packed_shown(vq->record, &p->record, p->next_used);
    p->in_flight = (uint16_t)(p->in_flight - p->batch_descs);
    p->batch_descs = p->batch_chains = 0;
}

/* Whether the guest's wish lies within the last "count" descriptors before "place". What it has not reached by now it
 * names with our wrap counter; with the other one it means the last time around. */
static bool event_passed(const struct virtqueue *vq, uint16_t place, uint16_t count, uint16_t event)
{
    uint16_t wanted = index_of(event);
    if (wrap_of(event) != wrap_of(place))
        wanted = (uint16_t)(wanted - vq->num);
    return vring_need_event(wanted, index_of(place), (uint16_t)(index_of(place) - count));
}

static uint32_t load_event(const struct vring_packed_desc_event *event)
{
    return READ_ONCE(*(const uint32_t *)(const void *)event);
}

static bool guest_wants_to_know(struct virtqueue *vq, uint16_t count)
{
    union {
        uint32_t whole;
        struct vring_packed_desc_event event;
    } u = {.whole = load_event(vq->packed->driver)};
    bool known = vq->signalled_known;
    vq->signalled_known = true;
    if (u.event.flags == VRING_PACKED_EVENT_FLAG_DISABLE)
        return false;
    if (u.event.flags != VRING_PACKED_EVENT_FLAG_DESC || !vq->event_idx)
        return true;
    return !known || event_passed(vq, vq->packed->next_used, count, u.event.off_wrap);
}

static bool packed_show_used(struct virtqueue *vq)
{
    struct packed_ring *p = vq->packed;
    uint16_t count = p->batch_descs;
    if (!p->desc || p->batch_chains == 0)
        return false;
    if (vq->record)
        record_batch(vq);
    /* The elements, status bytes and data before the flags that show them. */
    atomic_thread_fence(memory_order_release);
    WRITE_ONCE(p->desc[p->batch_index].flags, p->batch_flags);
    log_elements(vq, p->batch_index, 1);
    forget_batch(vq);
    /* The flags before the look at what the guest wants: it writes its wish and then looks at the flags, so one of us
     * sees the other. */
    atomic_thread_fence(memory_order_seq_cst);
    return guest_wants_to_know(vq, count);
}

/* ---- kicks -------------------------------------------------------------------- */

static bool packed_has_more(const struct virtqueue *vq)
{
    const struct packed_ring *p = vq->packed;
    return p->desc && is_available(READ_ONCE(p->desc[index_of(p->next_avail)].flags), p->next_avail);
}

static void set_wish(struct virtqueue *vq, uint16_t flags, uint16_t place)
{
    union {
        struct vring_packed_desc_event event;
        uint32_t whole;
    } u = {.event = {.off_wrap = place, .flags = flags}};
    WRITE_ONCE(*(uint32_t *)(void *)vq->packed->device, u.whole); /* a new place with old flags would be another wish */
    if (vq->log)
        dirty_log_mark(vq->log, vq->used_log_addr, sizeof u.event);
}

static bool packed_ask_for_kick(struct virtqueue *vq)
{
    if (vq->event_idx)
        set_wish(vq, VRING_PACKED_EVENT_FLAG_DESC, vq->packed->next_avail);
    else
        set_wish(vq, VRING_PACKED_EVENT_FLAG_ENABLE, 0);
    /* The wish before the last look: the guest writes its flags, then reads the wish. */
    atomic_thread_fence(memory_order_seq_cst);
    return packed_has_more(vq);
}

static void packed_no_kicks(struct virtqueue *vq)
{
    /* With EVENT_IDX a place that was passed does that by itself. */
    if (!vq->event_idx)
        set_wish(vq, VRING_PACKED_EVENT_FLAG_DISABLE, 0);
}

const struct ring_layout ring_packed = {
    .map = packed_map,
    .answerable = packed_answerable,
    .unmap = packed_unmap,
    .start = packed_start,
    .base = packed_base,
    .peek = packed_peek,
    .take = packed_take,
    .chain_begin = packed_chain_begin,
    .chain_next = packed_chain_next,
    .push = packed_push,
    .show_used = packed_show_used,
    .has_more = packed_has_more,
    .ask_for_kick = packed_ask_for_kick,
    .no_kicks = packed_no_kicks,
};

struct packed_ring *packed_ring_make(void)
{
    return calloc(1, sizeof(struct packed_ring));
}
