/* SPDX-License-Identifier: Apache-2.0
 *
 * The record of a packed ring's requests in flight (vhost-user specification,
 * "Inflight I/O tracking", packed virtqueue). See inflight.h first.
 *
 * Used elements are written over the descriptors of the ring, so the record
 * keeps a copy of each descriptor that was taken up. It is a pool of entries:
 * those that are free form a list from free_head on, those of a chain are
 * linked from its first to its "last". Nothing that a recovery needs is found
 * in the ring but whether the last batch was shown.
 *
 *   taken      the entries at the list's head are filled, and marked in flight;
 *              then, in one store, both heads of the list move behind them
 *   answered   (a batch) the entries go back to the list: free_head, then
 *              used_idx with its wrap counter; then the first of the batch's
 *              used elements is shown; then inflight = 0 for each, and
 *              old_free_head and the old used_idx with its wrap counter follow
 *   recovered  where used_idx and its wrap counter differ from the old ones and
 *              the ring's element there is not as the guest has made it
 *              available, the batch was shown: the old ones follow. Else the new
 *              ones go back to the old. What is on the free list is not in
 *              flight; what is marked else is taken up again in the order of the
 *              counters.
 *
 * used_idx alone (the specification compares no more) does not tell a batch
 * that has used the whole ring from none, and with the wrap counters stored one
 * by one a process could die between them: so the four go in one store of
 * eight bytes, and the two heads in one of four.
 */
#ifndef VS_INFLIGHT_PACKED_H
#define VS_INFLIGHT_PACKED_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "inflight_header.h"
#include "bounds.h"

struct inflight_packed_desc {
    uint8_t inflight;
    uint8_t padding;
    uint16_t next;
    uint16_t last; /* of the first entry of a chain, as "num" (how many) and the counter */
    uint16_t num;
    uint64_t counter;
    /* As the guest's descriptor was read. */
    uint16_t id;
    uint16_t flags;
    uint32_t len;
    uint64_t addr;
};

struct inflight_heads {
    uint16_t free_head, old_free_head;
};

struct inflight_used {
    uint16_t used_idx, old_used_idx;
    uint8_t used_wrap_counter, old_used_wrap_counter;
    uint8_t padding[2];
};

struct inflight_packed {
    uint64_t features; /* 0 */
    uint16_t version;  /* 0: not used yet; else INFLIGHT_VERSION */
    uint16_t desc_num;
    union {
        struct inflight_heads heads;
        uint32_t heads_whole;
    };
    union {
        struct inflight_used used;
        uint64_t used_whole;
    };
    uint8_t padding[5 + 3];
    struct inflight_packed_desc desc[VS_MAX_QUEUE_SIZE];
    uint8_t write_cache; /* ours: see struct inflight_ring */
};

static_assert(sizeof(struct inflight_packed_desc) == 32, "the specification's DescStatePacked");
static_assert(offsetof(struct inflight_packed, heads) == 12 && offsetof(struct inflight_packed, used) == 16 &&
                  offsetof(struct inflight_packed, desc) == 32,
              "the specification's QueueRegionPacked");
static_assert(VS_INFLIGHT_PACKED_RING_BYTES >= sizeof(struct inflight_packed) &&
                  VS_INFLIGHT_PACKED_RING_BYTES % 64 == 0,
              "each ring's part begins on a cache line");

/* A place in a packed ring: an index, and in bit 15 the wrap counter there. */
#define PACKED_WRAP 0x8000u

/* What this process knows of its record. The links are kept here too: what the frontend's memory says of them is looked
 * at when the ring starts, and not again. */
struct inflight_packed_state {
    uint64_t counter;
    uint16_t free_head;
    uint16_t next[VS_MAX_QUEUE_SIZE];
};

/* A chain that a former process has taken up and not answered. */
struct inflight_packed_chain {
    uint64_t counter;
    uint16_t entry, last, num, id;
};

/* A chain's descriptors as they were read. Returns the first entry; *last: the last one. There is room. */
uint16_t inflight_packed_taken(struct inflight_packed *r, struct inflight_packed_state *s, uint32_t count,
                               const struct vring_packed_desc *descs, uint16_t *last);
/* One of a batch, before it is shown. */
void inflight_packed_answered(struct inflight_packed *r, struct inflight_packed_state *s, uint16_t entry,
                              uint16_t last);
/* All of a batch were told; used: where the ring's next used element will be then. */
void inflight_packed_showing(struct inflight_packed *r, const struct inflight_packed_state *s, uint16_t used);
/* The batch was shown. First for each of its chains, then once. */
void inflight_packed_cleared(struct inflight_packed *r, uint16_t entry);
void inflight_packed_shown(struct inflight_packed *r, const struct inflight_packed_state *s, uint16_t used);

/* At a ring's start: what to take up again, in order, at most "num" chains; returns how many, or -1 for a record of
 * rubbish. ring: its descriptors. *used: where the next used element goes; a record that was not used yet begins
 * there. */
int inflight_packed_recover(struct inflight_packed *r, struct inflight_packed_state *s, uint32_t num,
                            const struct vring_packed_desc *ring, uint16_t *used, struct inflight_packed_chain *found);
/* A descriptor of a chain that was found. */
struct vring_packed_desc inflight_packed_desc_at(const struct inflight_packed *r, uint16_t entry);

#endif
