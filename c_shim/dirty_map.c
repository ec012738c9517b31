/* SPDX-License-Identifier: Apache-2.0 */
#include "dirty_map.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static bool get(const struct dirty_map *m, uint64_t region)
{
    return m->words[region / 64] >> (region % 64) & 1;
}

static void put(struct dirty_map *m, uint64_t region, bool dirty)
{
    uint64_t bit = 1ull << (region % 64);
    if (get(m, region) == dirty)
        return;
    m->words[region / 64] ^= bit;
    m->dirty += dirty ? 1 : (uint64_t)-1;
}

int dirty_map_init(struct dirty_map *m, uint64_t capacity_bytes, uint32_t region_bytes)
{
    assert(region_bytes && (region_bytes & (region_bytes - 1)) == 0);
    memset(m, 0, sizeof *m);
    m->capacity_bytes = capacity_bytes;
    m->region_shift = (unsigned)__builtin_ctz(region_bytes);
    m->regions = (capacity_bytes >> m->region_shift) + ((capacity_bytes & (region_bytes - 1)) != 0);
    m->words = calloc(m->regions / 64 + 1, sizeof *m->words);
    return m->words ? 0 : -ENOMEM;
}

void dirty_map_free(struct dirty_map *m)
{
    free(m->words);
    m->words = NULL;
}

void dirty_map_set_all(struct dirty_map *m)
{
    memset(m->words, 0xff, m->regions / 64 * 8);
    m->words[m->regions / 64] = (1ull << (m->regions % 64)) - 1;
    m->dirty = m->regions;
}

void dirty_map_clear_all(struct dirty_map *m)
{
    memset(m->words, 0, (m->regions / 64 + 1) * 8);
    m->dirty = 0;
}

void dirty_map_set(struct dirty_map *m, uint64_t offset, uint64_t length)
{
    assert(length > 0 && offset + length <= m->capacity_bytes);
    for (uint64_t r = offset >> m->region_shift; r <= (offset + length - 1) >> m->region_shift; r++)
        put(m, r, true);
}

void dirty_map_clear(struct dirty_map *m, uint64_t offset, uint64_t length)
{
    uint64_t region_bytes = 1ull << m->region_shift, end = offset + length;
    uint64_t first = (offset + region_bytes - 1) >> m->region_shift;
    uint64_t last = end == m->capacity_bytes ? m->regions : end >> m->region_shift;
    assert(length > 0 && end <= m->capacity_bytes);
    for (uint64_t r = first; r < last; r++)
        put(m, r, false);
}

bool dirty_map_all_dirty(const struct dirty_map *m, uint64_t offset, uint64_t length)
{
    if (m->dirty == 0)
        return false;
    for (uint64_t r = offset >> m->region_shift; r <= (offset + length - 1) >> m->region_shift; r++)
        if (!get(m, r))
            return false;
    return true;
}

bool dirty_map_find(const struct dirty_map *m, uint64_t offset, uint64_t max_bytes, uint64_t *run_offset,
                    uint64_t *run_length)
{
    uint64_t r = offset >> m->region_shift, end, most = max_bytes >> m->region_shift;
    if (m->dirty == 0)
        return false;
    while (r < m->regions) {
        uint64_t word = m->words[r / 64] >> (r % 64);
        if (word) {
            r += (uint64_t)__builtin_ctzll(word);
            break;
        }
        r = (r / 64 + 1) * 64;
    }
    if (r >= m->regions)
        return false;
    if (most == 0)
        most = 1;
    for (end = r + 1; end < m->regions && end - r < most && get(m, end); end++)
        ;
    *run_offset = r << m->region_shift;
    *run_length = (end << m->region_shift) - *run_offset;
    if (*run_offset + *run_length > m->capacity_bytes)
        *run_length = m->capacity_bytes - *run_offset;
    return true;
}
