/* SPDX-License-Identifier: Apache-2.0
 *
 * Which regions of the disk the bulk copy has still to do: a bit a region. A
 * clean map is passed over 64 regions at a time.
 */
#ifndef VS_DIRTY_MAP_H
#define VS_DIRTY_MAP_H

#include <stdbool.h>
#include <stdint.h>

struct dirty_map {
    uint64_t capacity_bytes;
    unsigned region_shift; /* region bytes = 1 << region_shift */
    uint64_t regions;
    uint64_t dirty;        /* how many bits are set */
    uint64_t *words;
};

/* region_bytes: a power of two. 0 or -ENOMEM. Begins clean. */
int dirty_map_init(struct dirty_map *m, uint64_t capacity_bytes, uint32_t region_bytes);
void dirty_map_free(struct dirty_map *m);

void dirty_map_set_all(struct dirty_map *m);
void dirty_map_clear_all(struct dirty_map *m);
/* Sets (clears) every region that the range touches (covers whole, or up to the capacity). */
void dirty_map_set(struct dirty_map *m, uint64_t offset, uint64_t length);
void dirty_map_clear(struct dirty_map *m, uint64_t offset, uint64_t length);
/* Whether every region that the range touches is dirty. */
bool dirty_map_all_dirty(const struct dirty_map *m, uint64_t offset, uint64_t length);
/* The first run of dirty regions at or after offset, at most max_bytes long; false: there is none. */
bool dirty_map_find(const struct dirty_map *m, uint64_t offset, uint64_t max_bytes, uint64_t *run_offset,
                    uint64_t *run_length);

#endif
