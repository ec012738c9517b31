/* SPDX-License-Identifier: Apache-2.0
 *
 * The dirty bitmap's file, as kills, power cuts, bad disks and people may leave
 * it. Mostly valid: what is changed gets a checksum that fits most of the time.
 * Whatever the file holds, a region may count as clean only if a whole block
 * says so, and, after a crash of the host, no extent of the newest whole log
 * covers it.
 */
#include <errno.h>

#include "../c/bitmap_image.h"
#include "choices.h"

#define ENSURE(condition)     \
    do {                      \
        if (!(condition))     \
            __builtin_trap(); \
    } while (0)

#define EXTENT_REGIONS (IMAGE_EXTENT / IMAGE_REGION)

static void write_bits(struct choices *c, struct image *m)
{
    for (unsigned n = choose(c, 16); n > 0; n--)
        image_set(m, choose(c, 512) + (choose(c, 2) ? 2 : 0), choose_raw(c, choose(c, 2) ? 8 : 1));
}

static void write_logs(struct choices *c, struct image *m)
{
    for (unsigned i = 0; i < 2; i++) {
        struct image_log *l = m->log[i];
        uint64_t count = choose(c, 2) ? choose(c, IMAGE_EXTENTS + 1) : choose(c, 3);
        for (uint64_t k = 0; k < count; k++)
            l->extent[k] = mostly(c, choose(c, 34));
        l->count = mostly(c, count);
        l->sequence = mostly(c, 2 - i + 2 * choose(c, 3));
        l->magic = mostly(c, IMAGE_LOG_MAGIC);
        image_log_seal(l);
        if (rarely(c))
            l->checksum ^= 1 + choose(c, 255);
    }
}

/* Any few bytes; most of the time somebody has made the checksums anew (that is the point: what is behind them). */
static void damage(struct choices *c, struct image *m)
{
    for (unsigned n = rarely(c) ? 1 + choose(c, 8) : 0; n > 0; n--) {
        uint64_t at = choose_raw(c, 2) % (m->bytes - 8), value = choose_raw(c, 8);
        memcpy(m->map + at, &value, 1 + choose(c, 8));
    }
    if (choose(c, 4) == 3)
        return;
    for (unsigned i = 0; i < IMAGE_BLOCKS; i++)
        m->block[i].checksum = image_block_sum(&m->block[i]);
    for (unsigned i = 0; i < 2; i++)
        image_log_seal(m->log[i]);
}

/* The words of a map that holds what must count as differing, and nothing else. */
static void work_out(const struct image *before, enum vs_bitmap_open how, struct dirty_map *must)
{
    const struct image_log *newest = image_newest(before);
    bool crash = how == VS_BITMAP_AFTER_HOST_CRASH;
    for (unsigned i = 0; i < IMAGE_BLOCKS; i++) {
        bool all = how == VS_BITMAP_FRESH || !image_block_whole(before, i) || (crash && !newest);
        for (uint64_t at = 0; at < BITMAP_BLOCK_WORDS && i * BITMAP_BLOCK_WORDS + at < IMAGE_WORDS; at++) {
            uint64_t word = i * BITMAP_BLOCK_WORDS + at;
            uint64_t last = word == IMAGE_WORDS - 1 ? (1ull << IMAGE_REGIONS % 64) - 1 : UINT64_MAX;
            must->words[word] = (all ? UINT64_MAX : before->block[i].words[at]) & last;
        }
    }
    for (uint64_t i = 0; crash && newest && i < newest->count; i++)
        for (uint64_t region = 0; region < EXTENT_REGIONS; region++) {
            uint64_t at = newest->extent[i] * EXTENT_REGIONS + region;
            if (newest->extent[i] <= IMAGE_CAPACITY / IMAGE_EXTENT && at < IMAGE_REGIONS)
                must->words[at / 64] |= 1ull << at % 64;
        }
}

/* An extent beyond the disk may wrap to one within it: more regions than need be, never fewer. */
static bool log_is_plain(const struct image_log *newest)
{
    for (uint64_t i = 0; newest && i < newest->count; i++)
        if (newest->extent[i] > IMAGE_CAPACITY / IMAGE_EXTENT)
            return false;
    return true;
}

static void compare(const struct image *before, enum vs_bitmap_open how, const struct dirty_map *found)
{
    bool plain = how != VS_BITMAP_AFTER_HOST_CRASH || log_is_plain(image_newest(before));
    struct dirty_map must;
    uint64_t dirty = 0;
    CHECK_EQUAL(dirty_map_init(&must, IMAGE_CAPACITY, IMAGE_REGION), 0);
    work_out(before, how, &must);
    for (uint64_t word = 0; word < IMAGE_WORDS; word++) {
        ENSURE((must.words[word] & ~found->words[word]) == 0);
        ENSURE(!plain || must.words[word] == found->words[word]);
        dirty += (uint64_t)__builtin_popcountll(found->words[word]);
    }
    ENSURE(found->dirty == dirty);
    dirty_map_free(&must);
}

static void change_and_reopen(struct choices *c, const struct image *m, vs_bitmap *b, struct dirty_map *map)
{
    struct dirty_map again;
    uint64_t bad, from_log;
    map->stored = bitmap_store;
    map->keeper = b;
    for (unsigned n = choose(c, 8); n > 0; n--) {
        uint64_t at = choose_raw(c, 4) % IMAGE_CAPACITY;
        dirty_map_set(map, at, 1 + choose_raw(c, 3) % (IMAGE_CAPACITY - at));
    }
    ENSURE(vs_bitmap_close(b) == 0);
    ENSURE(image_open(m, VS_BITMAP_SAME_BOOT, &b) == 0);
    vs_bitmap_found(b, &bad, &from_log);
    ENSURE(bad == 0 && from_log == 0);
    image_load(b, &again);
    ENSURE(again.dirty == map->dirty && memcmp(again.words, map->words, IMAGE_WORDS * 8) == 0);
    dirty_map_free(&again);
    ENSURE(vs_bitmap_close(b) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const enum vs_bitmap_open hows[] = {VS_BITMAP_SAME_BOOT, VS_BITMAP_AFTER_HOST_CRASH, VS_BITMAP_SAME_BOOT,
                                               VS_BITMAP_AFTER_HOST_CRASH, VS_BITMAP_FRESH};
    struct choices c = {data, size};
    struct image m = image_make(), before = image_make();
    struct dirty_map map;
    vs_bitmap *b = NULL;
    enum vs_bitmap_open how = hows[choose(&c, 5)];
    image_fill(&m);
    write_bits(&c, &m);
    write_logs(&c, &m);
    damage(&c, &m);
    memcpy(before.map, m.map, m.bytes);
    bool shorter = rarely(&c);
    if (shorter)
        ENSURE(ftruncate(m.fd, (off_t)(choose_raw(&c, 2) % m.bytes)) == 0);
    int rc = image_open(&m, how, &b);
    ENSURE(rc == (shorter ? -EUCLEAN : 0));
    if (rc == 0) {
        image_load(b, &map);
        compare(&before, how, &map);
        if (rarely(&c)) { /* cut short while it is open: told at the end, and no crash */
            ENSURE(ftruncate(m.fd, BITMAP_BLOCK_BYTES) == 0);
            bitmap_store(b, choose(&c, IMAGE_WORDS), choose_raw(&c, 8));
            ENSURE(bitmap_lost(b));
            ENSURE(vs_bitmap_close(b) == -EIO);
        } else {
            change_and_reopen(&c, &m, b, &map);
        }
        dirty_map_free(&map);
    }
    image_end(&m);
    image_end(&before);
    return 0;
}
