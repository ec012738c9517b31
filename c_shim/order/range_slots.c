/* SPDX-License-Identifier: Apache-2.0
 *
 * Turns for operations that overlap. See range_slots.h.
 */
#include "range_slots.h"

#include <assert.h>
#include <string.h>

static uint64_t first_chunk(const struct range_slot *s)
{
    return s->start / RANGE_CHUNK_BYTES;
}

static uint64_t chunks(const struct range_slot *s)
{
    return (s->end - 1) / RANGE_CHUNK_BYTES - first_chunk(s) + 1;
}

static bool overlap(const struct range_slot *a, const struct range_slot *b)
{
    return a->start < b->end && b->start < a->end;
}

void range_slots_init(struct range_slots *s)
{
    memset(s, 0, sizeof *s);
    list_init(&s->all);
}

static bool filter_says_free(const struct range_slots *s, const struct range_slot *slot)
{
    uint64_t n = chunks(slot), chunk = first_chunk(slot);
    if (s->wide || n > RANGE_WIDE_CHUNKS)
        return list_empty(&s->all);
    for (uint64_t i = 0; i < n; i++)
        if (s->filter[(chunk + i) % RANGE_FILTER])
            return false;
    return true;
}

static void filter_add(struct range_slots *s, const struct range_slot *slot, int by)
{
    uint64_t n = chunks(slot), chunk = first_chunk(slot);
    if (n > RANGE_WIDE_CHUNKS) {
        s->wide += (unsigned)by;
        return;
    }
    for (uint64_t i = 0; i < n; i++)
        s->filter[(chunk + i) % RANGE_FILTER] = (uint16_t)(s->filter[(chunk + i) % RANGE_FILTER] + by);
}

/* Whether an overlapping slot asked before this one. */
static bool blocked(const struct range_slots *s, const struct range_slot *slot)
{
    list_each(node, &s->all) {
        const struct range_slot *other = container_of(node, struct range_slot, link);
        if (other == slot)
            return false;
        if (overlap(other, slot))
            return true;
    }
    return false;
}

bool range_take(struct range_slots *s, struct range_slot *slot, uint64_t offset, uint64_t length)
{
    assert(length > 0);
    slot->start = offset;
    slot->end = offset + length;
    slot->granted = filter_says_free(s, slot) || !blocked(s, slot);
    if (!slot->granted)
        s->waiting++;
    list_append(&s->all, &slot->link);
    filter_add(s, slot, 1);
    return slot->granted;
}

void range_release(struct range_slots *s, struct range_slot *slot)
{
    filter_add(s, slot, -1);
    list_remove(&slot->link);
    if (!slot->granted)
        s->waiting--;
    if (s->waiting == 0)
        return;
    list_each(node, &s->all) {
        struct range_slot *w = container_of(node, struct range_slot, link);
        if (w->granted || !overlap(w, slot) || blocked(s, w))
            continue;
        w->granted = true;
        s->waiting--;
        w->grant(w);
    }
}
