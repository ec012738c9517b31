/* SPDX-License-Identifier: Apache-2.0
 *
 * Keeps the record of a packed ring's requests in flight, and finds out after a crash what to take up again. See
 * inflight_packed.h.
 */
#include "inflight_packed.h"

#include <stdlib.h>
#include <string.h>

#include "shared_memory.h"

#define NONE VS_MAX_QUEUE_SIZE /* the end of the free list */

static void store_heads(struct inflight_packed *r, uint16_t free_head, uint16_t old_free_head)
{
    union {
        struct inflight_heads heads;
        uint32_t whole;
    } u = {.heads = {free_head, old_free_head}};
    in_program_order();
    WRITE_ONCE(r->heads_whole, u.whole);
    in_program_order();
}

static struct inflight_used load_used(const struct inflight_packed *r)
{
    union {
        struct inflight_used used;
        uint64_t whole;
    } u = {.whole = READ_ONCE(r->used_whole)};
    return u.used;
}

/* Two places in the ring, each with its wrap counter. */
static void store_used(struct inflight_packed *r, uint16_t used, uint16_t old_used)
{
    union {
        struct inflight_used used;
        uint64_t whole;
    } u = {.used = {.used_idx = used & (PACKED_WRAP - 1),
                    .old_used_idx = old_used & (PACKED_WRAP - 1),
                    .used_wrap_counter = (used & PACKED_WRAP) != 0,
                    .old_used_wrap_counter = (old_used & PACKED_WRAP) != 0}};
    in_program_order();
    WRITE_ONCE(r->used_whole, u.whole);
    in_program_order();
}

static uint16_t place(uint16_t index, uint8_t wrap_counter)
{
    return (uint16_t)(index | (wrap_counter ? PACKED_WRAP : 0));
}

uint16_t inflight_packed_taken(struct inflight_packed *r, struct inflight_packed_state *s, uint32_t count,
                               const struct vring_packed_desc *descs, uint16_t *last)
{
    uint16_t first = s->free_head, at = first;
    for (uint32_t i = 0; i < count; i++) {
        struct inflight_packed_desc *d = &r->desc[s->free_head];
        at = s->free_head;
        WRITE_ONCE(d->addr, descs[i].addr);
        WRITE_ONCE(d->len, descs[i].len);
        WRITE_ONCE(d->flags, descs[i].flags);
        WRITE_ONCE(d->id, descs[i].id);
        s->free_head = s->next[at];
    }
    *last = at;
    WRITE_ONCE(r->desc[first].last, at);
    WRITE_ONCE(r->desc[first].num, (uint16_t)count);
    WRITE_ONCE(r->desc[first].counter, s->counter++);
    in_program_order();
    WRITE_ONCE(r->desc[first].inflight, 1);
    store_heads(r, s->free_head, s->free_head); /* until then a recovery finds the mark on the free list */
    return first;
}

void inflight_packed_answered(struct inflight_packed *r, struct inflight_packed_state *s, uint16_t entry, uint16_t last)
{
    s->next[last] = s->free_head;
    WRITE_ONCE(r->desc[last].next, s->free_head);
    s->free_head = entry;
}

void inflight_packed_showing(struct inflight_packed *r, const struct inflight_packed_state *s, uint16_t used)
{
    struct inflight_used u = load_used(r);
    store_heads(r, s->free_head, READ_ONCE(r->heads.old_free_head));
    store_used(r, used, place(u.old_used_idx, u.old_used_wrap_counter));
}

void inflight_packed_cleared(struct inflight_packed *r, uint16_t entry)
{
    in_program_order();
    WRITE_ONCE(r->desc[entry].inflight, 0);
}

void inflight_packed_shown(struct inflight_packed *r, const struct inflight_packed_state *s, uint16_t used)
{
    store_heads(r, s->free_head, s->free_head);
    store_used(r, used, used);
}

/* ---- recovery ------------------------------------------------------------ */

static void begin_record(struct inflight_packed *r, struct inflight_packed_state *s, uint16_t used)
{
    WRITE_ONCE(r->features, 0);
    WRITE_ONCE(r->desc_num, VS_MAX_QUEUE_SIZE);
    for (uint32_t i = 0; i < VS_MAX_QUEUE_SIZE; i++) {
        s->next[i] = (uint16_t)(i + 1);
        WRITE_ONCE(r->desc[i].next, (uint16_t)(i + 1));
        WRITE_ONCE(r->desc[i].inflight, 0);
    }
    s->free_head = 0;
    store_heads(r, 0, 0);
    store_used(r, used, used);
    WRITE_ONCE(r->version, INFLIGHT_VERSION);
}

/* The guest's AVAIL and USED bits of a descriptor that it has made available where the wrap counter is so. */
static bool is_available(uint16_t flags, bool wrap)
{
    bool avail = flags & (1u << VRING_PACKED_DESC_F_AVAIL), used = flags & (1u << VRING_PACKED_DESC_F_USED);
    return avail == wrap && used != wrap;
}

/* A batch that was shown is over; one that was not has not been. Returns where the next used element goes. */
static int settle_batch(struct inflight_packed *r, uint32_t num, const struct vring_packed_desc *ring, uint16_t *used)
{
    struct inflight_used u = load_used(r);
    uint16_t old = place(u.old_used_idx, u.old_used_wrap_counter), new = place(u.used_idx, u.used_wrap_counter);
    if (u.used_idx >= num || u.old_used_idx >= num)
        return -1;
    *used = old;
    if (new != old && !is_available(READ_ONCE(ring[u.old_used_idx].flags), u.old_used_wrap_counter)) {
        *used = new;
        store_heads(r, READ_ONCE(r->heads.free_head), READ_ONCE(r->heads.free_head));
    } else {
        store_heads(r, READ_ONCE(r->heads.old_free_head), READ_ONCE(r->heads.old_free_head));
    }
    store_used(r, *used, *used);
    return 0;
}

static void clear_free_list(struct inflight_packed *r)
{
    uint16_t at = READ_ONCE(r->heads.free_head);
    for (uint32_t i = 0; i < VS_MAX_QUEUE_SIZE && at < VS_MAX_QUEUE_SIZE; i++) {
        WRITE_ONCE(r->desc[at].inflight, 0);
        at = READ_ONCE(r->desc[at].next);
    }
}

/* Notes which entries a chain holds. False: it runs out of the record or into another chain, or its ID is none. */
static bool chain_is_whole(const struct inflight_packed *r, struct inflight_packed_state *s, uint32_t num, bool *held,
                           struct inflight_packed_chain *c)
{
    uint16_t at = c->entry;
    for (uint32_t i = 0; i < c->num; i++) {
        if (at >= VS_MAX_QUEUE_SIZE || held[at])
            return false;
        held[at] = true;
        c->last = at;
        at = READ_ONCE(r->desc[at].next);
        s->next[c->last] = at;
    }
    c->id = READ_ONCE(r->desc[c->last].id);
    return c->num > 0 && c->id < num;
}

static int by_counter(const void *a, const void *b)
{
    uint64_t x = ((const struct inflight_packed_chain *)a)->counter,
             y = ((const struct inflight_packed_chain *)b)->counter;
    return x < y ? -1 : x > y;
}

/* All that no chain holds. Those are not marked any more, so a process that dies within this leaves nothing wrong. */
static void link_free_entries(struct inflight_packed *r, struct inflight_packed_state *s, const bool *held)
{
    s->free_head = NONE;
    for (uint32_t i = VS_MAX_QUEUE_SIZE; i-- > 0;) {
        if (held[i])
            continue;
        s->next[i] = s->free_head;
        WRITE_ONCE(r->desc[i].next, s->free_head);
        s->free_head = (uint16_t)i;
    }
    store_heads(r, s->free_head, s->free_head);
}

int inflight_packed_recover(struct inflight_packed *r, struct inflight_packed_state *s, uint32_t num,
                            const struct vring_packed_desc *ring, uint16_t *used, struct inflight_packed_chain *found)
{
    bool held[VS_MAX_QUEUE_SIZE] = {false};
    uint32_t count = 0, descs = 0;
    s->counter = 0;
    if (READ_ONCE(r->version) != INFLIGHT_VERSION) {
        begin_record(r, s, *used);
        return 0;
    }
    if (settle_batch(r, num, ring, used) < 0)
        return -1;
    clear_free_list(r);
    for (uint32_t i = 0; i < VS_MAX_QUEUE_SIZE; i++) {
        struct inflight_packed_chain c = {.entry = (uint16_t)i};
        if (READ_ONCE(r->desc[i].inflight) != 1)
            continue;
        c.num = READ_ONCE(r->desc[i].num);
        c.counter = READ_ONCE(r->desc[i].counter);
        descs += c.num;
        if (descs > num || !chain_is_whole(r, s, num, held, &c))
            return -1;
        if (c.counter >= s->counter)
            s->counter = c.counter + 1;
        found[count++] = c;
    }
    link_free_entries(r, s, held);
    qsort(found, count, sizeof found[0], by_counter);
    return (int)count;
}

struct vring_packed_desc inflight_packed_desc_at(const struct inflight_packed *r, uint16_t entry)
{
    const struct inflight_packed_desc *d = &r->desc[entry];
    return (struct vring_packed_desc){
        .addr = READ_ONCE(d->addr), .len = READ_ONCE(d->len), .id = READ_ONCE(d->id), .flags = READ_ONCE(d->flags)};
}
