/* SPDX-License-Identifier: Apache-2.0
 *
 * A set of regions of a disk: a bit a region. Used for what a copy has still
 * to do, and for where two disks may differ (difference.h).
 *
 * The bits lie in pages of 32768 regions; how many are set is counted for each,
 * so that clean stretches of a huge disk are passed over (and their memory
 * never touched).
 */
#ifndef VS_DIRTY_MAP_H
#define VS_DIRTY_MAP_H

#include <stdbool.h>
#include <stdint.h>

enum { DIRTY_PAGE_WORDS = 512 };

struct dirty_map {
    uint64_t capacity_bytes;
    unsigned region_shift; /* region bytes = 1 << region_shift */
    uint64_t regions;
    uint64_t dirty; /* how many bits are set */
    uint64_t *words;
    uint32_t *in_page; /* of these, by page */
    /* Told of each word that has changed, at once: a copy of the map elsewhere. NULL: nobody. */
    void (*stored)(void *keeper, uint64_t word, uint64_t value);
    void *keeper;
};

/* region_bytes: a power of two. 0 or -ENOMEM. Begins clean. */
int dirty_map_init(struct dirty_map *m, uint64_t capacity_bytes, uint32_t region_bytes);
void dirty_map_free(struct dirty_map *m);
/* The disk has grown; what is new begins clean. 0 or -ENOMEM (then nothing has changed). */
int dirty_map_grow(struct dirty_map *m, uint64_t capacity_bytes);
/* It has not grown after all: what lies beyond is forgotten. */
void dirty_map_shrink(struct dirty_map *m, uint64_t capacity_bytes);

void dirty_map_set_all(struct dirty_map *m);
void dirty_map_clear_all(struct dirty_map *m);
/* Sets (clears) every region that the range touches (covers whole, or up to the capacity). */
void dirty_map_set(struct dirty_map *m, uint64_t offset, uint64_t length);
void dirty_map_clear(struct dirty_map *m, uint64_t offset, uint64_t length);
/* Sets (clears) these bits of one word. */
void dirty_map_set_bits(struct dirty_map *m, uint64_t word, uint64_t bits);
void dirty_map_clear_bits(struct dirty_map *m, uint64_t word, uint64_t bits);
/* Whether every (any) region that the range touches is dirty. */
bool dirty_map_all_dirty(const struct dirty_map *m, uint64_t offset, uint64_t length);
bool dirty_map_any_dirty(const struct dirty_map *m, uint64_t offset, uint64_t length);
/* The first run of dirty regions at or after offset, at most max_bytes long; false: there is none. */
bool dirty_map_find(const struct dirty_map *m, uint64_t offset, uint64_t max_bytes, uint64_t *run_offset,
                    uint64_t *run_length);
/* The first word at or after this one that has a bit set; UINT64_MAX: there is none. */
uint64_t dirty_map_next_word(const struct dirty_map *m, uint64_t word);
/* Adds every region that a set region of "from" touches (their region sizes may differ). */
void dirty_map_add(struct dirty_map *m, const struct dirty_map *from);
uint64_t dirty_map_bytes(const struct dirty_map *m);

#endif
