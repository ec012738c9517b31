/* SPDX-License-Identifier: Apache-2.0
 *
 * The dirty bitmap in a file: the difference map as it outlives this process,
 * and, with the activity log (activity_log.h), this machine. See bitmap_file.c.
 */
#ifndef VS_BITMAP_FILE_H
#define VS_BITMAP_FILE_H

#include <assert.h>
#include <stdbool.h>
#include <stdint.h>

#include "dirty_map.h"
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
    uint64_t log_bytes;    /* of one copy of the activity log */
    uint8_t *map;          /* of the bit blocks */
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

bool bitmap_fits(const struct vs_bitmap *b, uint64_t capacity_bytes, uint32_t region_bytes);
/* The disk has grown, and the file is long enough: the new blocks are put in order. Engine's thread; does not wait for
 * a disk. -EUCLEAN: the file is too short; -EINVAL; -ENOMEM. Nothing has changed then. */
int bitmap_grow(struct vs_bitmap *b, uint64_t capacity_bytes);
/* What vs_bitmap_open() found is put into "into". */
void bitmap_load(const struct vs_bitmap *b, struct dirty_map *into);
/* dirty_map.stored: the file follows the map word by word. */
void bitmap_store(void *bitmap, uint64_t word, uint64_t value);
/* The file behind the mapping was cut short; what is stored goes nowhere. */
bool bitmap_lost(const struct vs_bitmap *b);
/* Where the copy of the activity log with this sequence number lies. */
uint64_t bitmap_log_offset(const struct vs_bitmap *b, uint64_t sequence);
uint64_t bitmap_mix(uint64_t place, uint64_t value);

#endif
