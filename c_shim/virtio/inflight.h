/* SPDX-License-Identifier: Apache-2.0
 *
 * Which requests were taken up and not answered, kept in memory that the
 * frontend holds, so that it outlives this process (vhost-user specification,
 * "Inflight I/O tracking"): the region, and the record of a split ring. That of
 * a packed one is in inflight_packed.h.
 *
 * The frontend shares this memory, and what it holds outlived a process: each
 * field is read once, and every index checked. A killed process leaves its
 * stores in program order, so the order of the stores below is the whole
 * protocol; the fences bind the compiler.
 *
 *   taken      counter, then inflight = 1
 *   answered   the head joins the batch's list (next, last_batch_head), then
 *              the used index is published, then inflight = 0 for the whole
 *              batch, then used_idx follows
 *   recovered  where used_idx lags behind the ring's used index, the last
 *              batch was published: its entries are cleared. What is still
 *              marked was not answered, and is taken up again in the order of
 *              the counters.
 */
#ifndef VS_INFLIGHT_H
#define VS_INFLIGHT_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "inflight_header.h"
#include "bounds.h"

struct inflight_desc {
    uint8_t inflight;
    uint8_t padding[5];
    uint16_t next;
    uint64_t counter;
};

struct inflight_ring {
    uint64_t features; /* 0 */
    uint16_t version;  /* 0: not used yet; else INFLIGHT_VERSION */
    uint16_t desc_num;
    uint16_t last_batch_head;
    uint16_t used_idx;
    struct inflight_desc desc[VS_MAX_QUEUE_SIZE];
    /* Ours, behind what the specification lays out, and of the first ring alone: frontends do not tell a new
     * process the mode that the guest has set, and in write-through mode the guest sends no flushes. */
    uint8_t write_cache; /* enum inflight_write_cache */
};

enum inflight_write_cache { INFLIGHT_CACHE_UNKNOWN, INFLIGHT_CACHE_WRITETHROUGH, INFLIGHT_CACHE_WRITEBACK };

static_assert(sizeof(struct inflight_desc) == 16, "the specification's DescStateSplit");
static_assert(offsetof(struct inflight_ring, desc) == 16, "the specification's QueueRegionSplit");

/* A ring's part of the region is always for the largest ring: a frontend may name
 * its size only after it has got the region. */
static_assert(VS_INFLIGHT_RING_BYTES >= sizeof(struct inflight_ring) && VS_INFLIGHT_RING_BYTES % 64 == 0,
              "each ring's part begins on a cache line");

/* The region of an attachment. */
struct inflight_area {
    void *map; /* NULL: there is none */
    uint64_t map_bytes;
    uint8_t *base;
    uint32_t queues, ring_bytes;
    bool packed; /* all rings of an attachment are laid out alike */
    int sigbus_slot;
};

/* Closes fd. 0 or a negative errno; on failure there is no region. */
int inflight_map(struct inflight_area *area, int fd, uint64_t bytes, uint64_t offset, uint32_t queues, bool packed);
void inflight_unmap(struct inflight_area *area);
/* The frontend took its memory away (guest_memory.h, SIGBUS). */
bool inflight_lost(const struct inflight_area *area);
/* A struct inflight_ring or inflight_packed; NULL: this queue has none. */
void *inflight_record(const struct inflight_area *area, uint32_t queue);

/* The write cache mode that the record is for; changes nothing where there is none. */
void inflight_keep_write_cache(const struct inflight_area *area, bool write_cache);
void inflight_write_cache(const struct inflight_area *area, bool *write_cache);

void inflight_taken(struct inflight_ring *r, uint16_t head, uint64_t counter);
/* Before the used index is published. */
void inflight_answered(struct inflight_ring *r, uint16_t head);
/* After it was published, with so many heads answered since the last time. */
void inflight_batch_done(struct inflight_ring *r, uint16_t count, uint16_t used_idx);
/* At a ring's start: the heads to take up again, in order, at most "num" of them; returns how many, and the
 * counter to go on with. used_idx is the ring's. Initialises a region that was not used yet. */
uint32_t inflight_recover(struct inflight_ring *r, uint32_t num, uint16_t used_idx, uint16_t *heads, uint64_t *counter);

#endif
