/* SPDX-License-Identifier: Apache-2.0 */
#include "ring.h"

enum { AVAIL_NO_INTERRUPT = 1, USED_NO_NOTIFY = 1 };
enum { PACKED_AVAIL = 1 << 7, PACKED_USED = 1 << 15, WRAP = 0x8000 };
enum { EVENTS_ENABLE = 0, EVENTS_DISABLE = 1, EVENTS_DESCRIPTOR = 2 };

static void set_driver_wish(struct ring *ring, uint16_t flags)
{
    union {
        struct suppression wish;
        uint32_t whole;
    } u = {.wish = {ring->used_next, flags}};
    __atomic_store_n((uint32_t *)ring->driver, u.whole, __ATOMIC_RELAXED);
}

void ring_begin(struct ring *ring, bool packed, bool event_idx, uint32_t size)
{
    ring->packed = packed;
    ring->event_idx = event_idx;
    ring->size = size;
    ring->next = ring->published = ring->used_next = ring->used_known = packed ? WRAP : 0;
    if (packed)
        set_driver_wish(ring, EVENTS_DISABLE);
    else if (!event_idx)
        ring->avail->flags = AVAIL_NO_INTERRUPT;
}

uint32_t ring_base(const struct ring *ring)
{
    return ring->packed ? ring->published | (uint32_t)ring->used_next << 16 : ring->published;
}

/* Both events lie behind the other ring's last element (virtio 1.x 2.7.7 and 2.7.9). */
static uint16_t *used_event(const struct ring *ring)
{
    return &ring->avail->ring[ring->size];
}

static uint16_t *avail_event(const struct ring *ring)
{
    return (uint16_t *)&ring->used->ring[ring->size];
}

static uint16_t step(const struct ring *ring, uint16_t place, uint32_t steps)
{
    uint32_t index = (place & (WRAP - 1u)) + steps;
    uint32_t wrap = place & WRAP;
    return (uint16_t)(index < ring->size ? wrap | index : (wrap ^ WRAP) | (index - ring->size));
}

/* ---- putting ------------------------------------------------------------------- */

static void put_split(struct ring *ring, uint32_t number, const struct segment *segments, uint32_t count, void *table,
                      uint64_t table_at)
{
    uint16_t head = (uint16_t)(number * ring->stride), first = table ? 0 : head;
    struct descriptor *to = table ? table : ring->descriptors;
    for (uint32_t i = 0; i < count; i++) {
        uint16_t flags = (uint16_t)((segments[i].device_writes ? DESC_WRITE : 0) | (i + 1 < count ? DESC_NEXT : 0));
        to[first + i] = (struct descriptor){segments[i].address, segments[i].bytes, {flags, (uint16_t)(first + i + 1)}};
    }
    if (table)
        ring->descriptors[head] = (struct descriptor){table_at, (uint32_t)(count * sizeof *to), {DESC_INDIRECT, 0}};
    ring->avail->ring[ring->next++ & (ring->size - 1)] = head;
}

/* The first descriptor that was not published shows all that follow: its flags come last. */
static void put_descriptor(struct ring *ring, uint64_t address, uint32_t bytes, uint16_t id, uint16_t flags)
{
    struct descriptor *to = &ring->descriptors[ring->next & (WRAP - 1)];
    flags |= ring->next & WRAP ? PACKED_AVAIL : PACKED_USED;
    to->address = address;
    to->bytes = bytes;
    to->last[0] = id;
    if (ring->next == ring->published)
        ring->hidden_flags = flags;
    else
        to->last[1] = flags;
    ring->next = step(ring, ring->next, 1);
}

static void put_packed(struct ring *ring, uint16_t number, const struct segment *segments, uint32_t count, void *table,
                       uint64_t table_at)
{
    struct descriptor *to = table;
    for (uint32_t i = 0; i < count; i++) {
        uint16_t flags = segments[i].device_writes ? DESC_WRITE : 0;
        if (to)
            to[i] = (struct descriptor){segments[i].address, segments[i].bytes, {0, flags}};
        else
            put_descriptor(ring, segments[i].address, segments[i].bytes, number,
                           (uint16_t)(flags | (i + 1 < count ? DESC_NEXT : 0)));
    }
    if (to)
        put_descriptor(ring, table_at, (uint32_t)(count * sizeof *to), number, DESC_INDIRECT);
    ring->list_length[number] = (uint16_t)(table ? 1 : count);
}

void ring_put(struct ring *ring, uint32_t number, const struct segment *segments, uint32_t count, void *table,
              uint64_t table_at)
{
    if (ring->packed)
        put_packed(ring, (uint16_t)number, segments, count, table, table_at);
    else
        put_split(ring, number, segments, count, table, table_at);
}

/* The device's wish lies within what was published since "old". */
static bool passed(uint16_t wish, uint16_t now, uint16_t old)
{
    return (uint16_t)(now - wish - 1) < (uint16_t)(now - old);
}

static bool packed_wants_kick(const struct ring *ring, uint16_t old)
{
    union {
        uint32_t whole;
        struct suppression wish;
    } u = {.whole = __atomic_load_n((uint32_t *)ring->device, __ATOMIC_RELAXED)};
    uint16_t now = ring->published & (WRAP - 1), wish = u.wish.place & (WRAP - 1), before = old & (WRAP - 1);
    if (!ring->event_idx || u.wish.flags != EVENTS_DESCRIPTOR)
        return u.wish.flags != EVENTS_DISABLE;
    if ((u.wish.place ^ ring->published) & WRAP)
        wish = (uint16_t)(wish - ring->size);
    if ((old ^ ring->published) & WRAP)
        before = (uint16_t)(before - ring->size);
    return passed(wish, now, before);
}

bool ring_publish(struct ring *ring)
{
    uint16_t old = ring->published;
    if (old == ring->next)
        return false;
    if (ring->packed)
        __atomic_store_n(&ring->descriptors[old & (WRAP - 1)].last[1], ring->hidden_flags, __ATOMIC_RELEASE);
    else
        __atomic_store_n(&ring->avail->index, ring->next, __ATOMIC_RELEASE);
    ring->published = ring->next;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (ring->packed)
        return packed_wants_kick(ring, old);
    if (ring->event_idx)
        return passed(__atomic_load_n(avail_event(ring), __ATOMIC_RELAXED), ring->published, old);
    return !(__atomic_load_n(&ring->used->flags, __ATOMIC_RELAXED) & USED_NO_NOTIFY);
}

/* ---- answers --------------------------------------------------------------------- */

static bool packed_is_used(const struct ring *ring)
{
    uint16_t flags = __atomic_load_n(&ring->descriptors[ring->used_next & (WRAP - 1)].last[1], __ATOMIC_ACQUIRE);
    return (flags & (PACKED_AVAIL | PACKED_USED)) == (ring->used_next & WRAP ? PACKED_AVAIL | PACKED_USED : 0);
}

bool ring_something_used(const struct ring *ring)
{
    if (ring->packed)
        return packed_is_used(ring);
    return __atomic_load_n(&ring->used->index, __ATOMIC_ACQUIRE) != ring->used_next;
}

bool ring_next_used(struct ring *ring, uint32_t *number)
{
    if (ring->packed) {
        if (!packed_is_used(ring))
            return false;
        *number = ring->descriptors[ring->used_next & (WRAP - 1)].last[0];
        if (*number < ring->size)
            ring->used_next = step(ring, ring->used_next, ring->list_length[*number]);
        return true;
    }
    if (ring->used_known == ring->used_next) {
        ring->used_known = __atomic_load_n(&ring->used->index, __ATOMIC_ACQUIRE);
        if (ring->used_known == ring->used_next)
            return false;
    }
    uint32_t head = ring->used->ring[ring->used_next++ & (ring->size - 1)].id;
    *number = head % ring->stride ? UINT32_MAX : head / ring->stride;
    return true;
}

void ring_ask_for_call(struct ring *ring)
{
    if (ring->packed)
        set_driver_wish(ring, ring->event_idx ? EVENTS_DESCRIPTOR : EVENTS_ENABLE);
    else if (ring->event_idx)
        __atomic_store_n(used_event(ring), ring->used_next, __ATOMIC_RELAXED);
    else
        __atomic_store_n(&ring->avail->flags, 0, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

void ring_no_calls(struct ring *ring)
{
    if (ring->event_idx)
        return; /* a wish that was passed does that by itself */
    if (ring->packed)
        set_driver_wish(ring, EVENTS_DISABLE);
    else
        __atomic_store_n(&ring->avail->flags, AVAIL_NO_INTERRUPT, __ATOMIC_RELAXED);
}
