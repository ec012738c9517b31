/* SPDX-License-Identifier: Apache-2.0
 *
 * Room in a ring of bytes: taken at its head, given back in any order, free
 * again from its tail on. Every piece is contiguous; what is left at the end
 * of the ring is skipped when a piece does not fit there.
 */
#ifndef VS_RING_ALLOC_H
#define VS_RING_ALLOC_H

#include <stdbool.h>
#include <stdint.h>

struct ring_slot {
    uint64_t end; /* free-running position behind the piece */
    bool live;
};

struct ring_alloc {
    uint8_t *base;
    uint64_t bytes; /* of the ring; a multiple of the unit */
    uint32_t unit_bytes;
    uint32_t slot_count;
    struct ring_slot *slots;       /* slot number modulo slot_count */
    uint64_t head_slot, tail_slot; /* free-running */
    uint64_t head, tail;           /* free-running positions */
};

/* 0 or -ENOMEM. bytes is rounded up to the unit; memory is touched only when used. */
int ring_alloc_init(struct ring_alloc *r, uint64_t bytes, uint32_t unit_bytes, uint32_t slot_count);
void ring_alloc_free(struct ring_alloc *r);

/* A slot number, and where its memory is (bytes 0: a slot alone); -1: no room now. */
int64_t ring_take(struct ring_alloc *r, uint64_t bytes, uint8_t **memory);
void ring_give(struct ring_alloc *r, int64_t slot);

static inline uint64_t ring_used(const struct ring_alloc *r)
{
    return r->head - r->tail;
}

#endif
