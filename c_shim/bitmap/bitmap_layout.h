/* SPDX-License-Identifier: Apache-2.0
 *
 * What the dirty bitmap's file holds, and where. See bitmap_file.c.
 */
#ifndef VS_BITMAP_LAYOUT_H
#define VS_BITMAP_LAYOUT_H

#include <assert.h>
#include <stdbool.h>
#include <stdint.h>

#include "shim.h"

#define BITMAP_BLOCK_BYTES 4096u
#define BITMAP_BLOCK_WORDS 510u

/* As it lies on the disk; little-endian machines only, as virtio 1.x itself. */
struct bitmap_block {
    uint64_t checksum; /* the exclusive or of bitmap_mix() of every word below and of "number" */
    uint64_t number;   /* BITMAP_MAGIC + which block it is: a page of zeroes is no valid block */
    uint64_t words[BITMAP_BLOCK_WORDS];
};
static_assert(sizeof(struct bitmap_block) == BITMAP_BLOCK_BYTES, "a block is a page");

struct vs_bitmap {
    int fd;
    struct vs_bitmap_shape shape;
    uint64_t words, blocks;
    uint64_t log_bytes; /* of one copy of the activity log */
    uint8_t *map;       /* of the bit blocks */
    uint64_t map_bytes;
    int sigbus_slot;
    uint64_t log_sequence; /* of the newest copy */
    uint64_t bad_blocks;   /* found at open */
    uint64_t log_regions;  /* set at open because their extent was active when the machine went down */
    uint32_t slots;        /* extents active at once: shape.extents, or fewer in a test */
    /* For tests: told when a sync of the file begins, and when it has succeeded. NULL: nobody. */
    void (*sync_seen)(void *watcher, bool begun);
    void *sync_watcher;
};

/* Any difference in place or value changes about half of the bits (the finalizer of splitmix64). */
static inline uint64_t bitmap_mix(uint64_t place, uint64_t value)
{
    uint64_t z = value + (place + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Where the copy of the activity log with this sequence number lies. */
static inline uint64_t bitmap_log_offset(const struct vs_bitmap *b, uint64_t sequence)
{
    return BITMAP_BLOCK_BYTES + (sequence & 1) * b->log_bytes;
}

#endif
