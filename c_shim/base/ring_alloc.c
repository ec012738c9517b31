/* SPDX-License-Identifier: Apache-2.0
 *
 * Pieces of a ring of bytes, handed out and taken back. See ring_alloc.h.
 */
#include "ring_alloc.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "own_memory.h"

int ring_alloc_init(struct ring_alloc *r, uint64_t bytes, uint32_t unit_bytes, uint32_t slot_count)
{
    memset(r, 0, sizeof *r);
    r->unit_bytes = unit_bytes;
    r->bytes = (bytes + unit_bytes - 1) / unit_bytes * unit_bytes;
    r->slot_count = slot_count;
    r->slots = calloc(slot_count, sizeof *r->slots);
    r->base = own_memory_map(r->bytes);
    if (!r->slots || !r->base) {
        ring_alloc_free(r);
        return -ENOMEM;
    }
    return 0;
}

void ring_alloc_free(struct ring_alloc *r)
{
    own_memory_unmap(r->base, r->bytes);
    free(r->slots);
    memset(r, 0, sizeof *r);
}

int64_t ring_take(struct ring_alloc *r, uint64_t bytes, uint8_t **memory)
{
    uint64_t start = r->head, at = r->head % r->bytes;
    uint64_t need = (bytes + r->unit_bytes - 1) / r->unit_bytes * r->unit_bytes;
    struct ring_slot *slot;
    if (need > r->bytes || r->head_slot - r->tail_slot == r->slot_count)
        return -1;
    if (need > r->bytes - at)
        start += r->bytes - at;
    if (start + need - r->tail > r->bytes)
        return -1;
    slot = &r->slots[r->head_slot % r->slot_count];
    slot->end = r->head = start + need;
    slot->live = true;
    *memory = r->base + start % r->bytes;
    return (int64_t)r->head_slot++;
}

void ring_give(struct ring_alloc *r, int64_t slot)
{
    uint64_t number = (uint64_t)slot;
    assert(number >= r->tail_slot && number < r->head_slot && r->slots[number % r->slot_count].live);
    r->slots[number % r->slot_count].live = false;
    while (r->tail_slot < r->head_slot && !r->slots[r->tail_slot % r->slot_count].live) {
        r->tail = r->slots[r->tail_slot % r->slot_count].end;
        r->tail_slot++;
    }
    if (r->tail_slot == r->head_slot) /* empty: begin at the start, so that an idle log touches few pages */
        r->head = r->tail = (r->head + r->bytes - 1) / r->bytes * r->bytes;
}
