/* SPDX-License-Identifier: Apache-2.0
 *
 * A set of regions of a disk, as bits. See dirty_map.h.
 */
#include "dirty_map.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static uint64_t word_count(const struct dirty_map *m)
{
    return m->regions / 64 + (m->regions % 64 != 0);
}

static uint64_t page_count(const struct dirty_map *m)
{
    return word_count(m) / DIRTY_PAGE_WORDS + 1;
}

/* Every change of a bit goes through here. */
static void store(struct dirty_map *m, uint64_t word, uint64_t value)
{
    uint64_t before = m->words[word];
    int64_t change;
    if (before == value)
        return;
    change = __builtin_popcountll(value) - __builtin_popcountll(before);
    m->words[word] = value;
    m->dirty += (uint64_t)change;
    m->in_page[word / DIRTY_PAGE_WORDS] += (uint32_t)change;
    if (m->stored)
        m->stored(m->keeper, word, value);
}

/* The bits first .. last (of the same word) set. */
static uint64_t mask(uint64_t first, uint64_t last)
{
    return ~0ull << (first % 64) & ~0ull >> (63 - last % 64);
}

static void store_range(struct dirty_map *m, uint64_t first, uint64_t last, bool dirty)
{
    for (uint64_t word = first / 64; word <= last / 64; word++) {
        uint64_t bits = mask(word == first / 64 ? first : 0, word == last / 64 ? last : 63);
        store(m, word, dirty ? m->words[word] | bits : m->words[word] & ~bits);
    }
}

static uint64_t regions_of(const struct dirty_map *m, uint64_t capacity_bytes)
{
    return (capacity_bytes >> m->region_shift) + ((capacity_bytes & ((1ull << m->region_shift) - 1)) != 0);
}

int dirty_map_init(struct dirty_map *m, uint64_t capacity_bytes, uint32_t region_bytes)
{
    assert(region_bytes && (region_bytes & (region_bytes - 1)) == 0);
    memset(m, 0, sizeof *m);
    m->capacity_bytes = capacity_bytes;
    m->region_shift = (unsigned)__builtin_ctz(region_bytes);
    m->regions = regions_of(m, capacity_bytes);
    m->words = calloc(word_count(m) + 1, sizeof *m->words);
    m->in_page = calloc(page_count(m), sizeof *m->in_page);
    if (m->words && m->in_page)
        return 0;
    dirty_map_free(m);
    return -ENOMEM;
}

void dirty_map_free(struct dirty_map *m)
{
    free(m->words);
    free(m->in_page);
    m->words = NULL;
    m->in_page = NULL;
}

int dirty_map_grow(struct dirty_map *m, uint64_t capacity_bytes)
{
    struct dirty_map larger;
    assert(capacity_bytes >= m->capacity_bytes);
    if (dirty_map_init(&larger, capacity_bytes, 1u << m->region_shift) < 0)
        return -ENOMEM;
    for (uint64_t word = 0; (word = dirty_map_next_word(m, word)) != UINT64_MAX; word++)
        dirty_map_set_bits(&larger, word, m->words[word]);
    larger.stored = m->stored;
    larger.keeper = m->keeper;
    dirty_map_free(m);
    *m = larger;
    return 0;
}

void dirty_map_shrink(struct dirty_map *m, uint64_t capacity_bytes)
{
    uint64_t regions = regions_of(m, capacity_bytes);
    assert(capacity_bytes <= m->capacity_bytes);
    if (regions < m->regions)
        store_range(m, regions, m->regions - 1, false);
    m->capacity_bytes = capacity_bytes;
    m->regions = regions;
}

void dirty_map_set_all(struct dirty_map *m)
{
    if (m->regions)
        store_range(m, 0, m->regions - 1, true);
}

void dirty_map_clear_all(struct dirty_map *m)
{
    for (uint64_t word = 0; (word = dirty_map_next_word(m, word)) != UINT64_MAX; word++)
        store(m, word, 0);
    assert(m->dirty == 0);
}

void dirty_map_set(struct dirty_map *m, uint64_t offset, uint64_t length)
{
    assert(length > 0 && offset + length <= m->capacity_bytes);
    store_range(m, offset >> m->region_shift, (offset + length - 1) >> m->region_shift, true);
}

void dirty_map_clear(struct dirty_map *m, uint64_t offset, uint64_t length)
{
    uint64_t region_bytes = 1ull << m->region_shift, end = offset + length;
    uint64_t first = (offset + region_bytes - 1) >> m->region_shift;
    uint64_t last = end == m->capacity_bytes ? m->regions : end >> m->region_shift;
    assert(length > 0 && end <= m->capacity_bytes);
    if (first < last)
        store_range(m, first, last - 1, false);
}

void dirty_map_set_bits(struct dirty_map *m, uint64_t word, uint64_t bits)
{
    store(m, word, m->words[word] | bits);
}

void dirty_map_clear_bits(struct dirty_map *m, uint64_t word, uint64_t bits)
{
    store(m, word, m->words[word] & ~bits);
}

static bool all_or_any(const struct dirty_map *m, uint64_t offset, uint64_t length, bool any)
{
    uint64_t first = offset >> m->region_shift, last = (offset + length - 1) >> m->region_shift;
    if (m->dirty == 0)
        return false;
    for (uint64_t word = first / 64; word <= last / 64; word++) {
        uint64_t bits = mask(word == first / 64 ? first : 0, word == last / 64 ? last : 63);
        if (any ? (m->words[word] & bits) != 0 : (m->words[word] & bits) != bits)
            return any;
    }
    return !any;
}

bool dirty_map_all_dirty(const struct dirty_map *m, uint64_t offset, uint64_t length)
{
    return all_or_any(m, offset, length, false);
}

bool dirty_map_any_dirty(const struct dirty_map *m, uint64_t offset, uint64_t length)
{
    return all_or_any(m, offset, length, true);
}

uint64_t dirty_map_next_word(const struct dirty_map *m, uint64_t word)
{
    uint64_t words = word_count(m);
    while (m->dirty && word < words) {
        if (m->in_page[word / DIRTY_PAGE_WORDS] == 0)
            word = (word / DIRTY_PAGE_WORDS + 1) * DIRTY_PAGE_WORDS;
        else if (m->words[word])
            return word;
        else
            word++;
    }
    return UINT64_MAX;
}

static bool get(const struct dirty_map *m, uint64_t region)
{
    return m->words[region / 64] >> (region % 64) & 1;
}

/* The first dirty region from r on; m->regions: there is none. */
static uint64_t next_region(const struct dirty_map *m, uint64_t r)
{
    uint64_t word = r / 64, rest;
    if (m->dirty == 0 || r >= m->regions)
        return m->regions;
    rest = m->words[word] & ~0ull << (r % 64);
    if (!rest) {
        word = dirty_map_next_word(m, word + 1);
        if (word == UINT64_MAX)
            return m->regions;
        rest = m->words[word];
    }
    return word * 64 + (uint64_t)__builtin_ctzll(rest);
}

bool dirty_map_find(const struct dirty_map *m, uint64_t offset, uint64_t max_bytes, uint64_t *run_offset,
                    uint64_t *run_length)
{
    uint64_t r = next_region(m, offset >> m->region_shift), end, most = max_bytes >> m->region_shift;
    if (r == m->regions)
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

void dirty_map_add(struct dirty_map *m, const struct dirty_map *from)
{
    uint64_t offset = 0, length;
    assert(m->capacity_bytes == from->capacity_bytes);
    while (dirty_map_find(from, offset, UINT64_MAX, &offset, &length)) {
        dirty_map_set(m, offset, length);
        offset += length;
        if (offset == m->capacity_bytes)
            return;
    }
}

uint64_t dirty_map_bytes(const struct dirty_map *m)
{
    uint64_t last = m->regions - 1, bytes = m->dirty << m->region_shift;
    if (m->regions && get(m, last)) /* it may be a part only */
        bytes -= (m->regions << m->region_shift) - m->capacity_bytes;
    return bytes;
}
