/* SPDX-License-Identifier: Apache-2.0 */
#include "dirty_map.h"

#include "harness.h"

/* A map against an array of truth values. */
enum { REGION = 4096, REGIONS_MAX = 200 };

struct pair {
    struct dirty_map map;
    bool dirty[REGIONS_MAX];
};

static void compare(const struct pair *p)
{
    uint64_t count = 0, at = 0, offset, length;
    for (uint64_t r = 0; r < p->map.regions; r++) {
        count += p->dirty[r];
        CHECK_EQUAL(dirty_map_all_dirty(&p->map, r * REGION, 1), p->dirty[r]);
    }
    CHECK_EQUAL(p->map.dirty, count);
    /* Found runs are all there is, in order. */
    for (uint64_t r = 0; r < p->map.regions; r++) {
        if (!p->dirty[r])
            continue;
        CHECK(dirty_map_find(&p->map, at, 1, &offset, &length));
        CHECK_EQUAL(offset, r * REGION);
        CHECK_EQUAL(length, (r + 1) * REGION > p->map.capacity_bytes ? p->map.capacity_bytes % REGION : REGION);
        at = offset + REGION;
    }
    CHECK(at >= p->map.capacity_bytes || !dirty_map_find(&p->map, at, 1, &offset, &length));
}

static void against_an_array(uint64_t capacity, uint64_t seed)
{
    struct pair p;
    uint64_t state = seed;
    memset(&p, 0, sizeof p);
    CHECK_EQUAL(dirty_map_init(&p.map, capacity, REGION), 0);
    CHECK_EQUAL(p.map.regions, (capacity + REGION - 1) / REGION);
    CHECK(p.map.regions <= REGIONS_MAX);
    compare(&p);
    for (int step = 0; step < 3000; step++) {
        uint64_t offset = test_random(&state) % capacity;
        uint64_t most = test_random(&state) % 4 ? 3 * REGION : capacity;
        uint64_t length = 1 + test_random(&state) % (capacity - offset < most ? capacity - offset : most);
        uint64_t action = test_random(&state) % 64;
        if (test_random(&state) % 4 == 0)
            length = capacity - offset;
        bool all = true;
        for (uint64_t r = offset / REGION; r <= (offset + length - 1) / REGION; r++)
            all = all && p.dirty[r];
        CHECK_EQUAL(dirty_map_all_dirty(&p.map, offset, length), all);
        if (action == 0) {
            dirty_map_set_all(&p.map);
            memset(p.dirty, true, p.map.regions);
        } else if (action == 1) {
            dirty_map_clear_all(&p.map);
            memset(p.dirty, false, sizeof p.dirty);
        } else if (action % 2) {
            dirty_map_set(&p.map, offset, length);
            for (uint64_t r = offset / REGION; r <= (offset + length - 1) / REGION; r++)
                p.dirty[r] = true;
        } else { /* only what it covers whole, or up to the capacity */
            dirty_map_clear(&p.map, offset, length);
            for (uint64_t r = 0; r < p.map.regions; r++) {
                uint64_t end = (r + 1) * REGION < capacity ? (r + 1) * REGION : capacity;
                if (offset <= r * REGION && end <= offset + length)
                    p.dirty[r] = false;
            }
        }
        compare(&p);
    }
    dirty_map_free(&p.map);
}

static void at_random(void)
{
    against_an_array(1, 1);
    against_an_array(REGION, 2);
    against_an_array(64 * REGION, 3);
    against_an_array(64 * REGION + 1, 4);
    against_an_array(63 * REGION + 512, 5);
    against_an_array(130 * REGION, 6);
}

static void runs(void)
{
    struct dirty_map m;
    uint64_t offset, length;
    CHECK_EQUAL(dirty_map_init(&m, 1000 * REGION + 512, REGION), 0);
    CHECK(!dirty_map_find(&m, 0, 1 << 20, &offset, &length));
    dirty_map_set(&m, 10 * REGION, 300 * REGION);
    CHECK(dirty_map_find(&m, 0, 1 << 20, &offset, &length)); /* cut at the most that was asked for */
    CHECK_EQUAL(offset, 10 * REGION);
    CHECK_EQUAL(length, 1 << 20);
    CHECK(dirty_map_find(&m, 300 * REGION, 1 << 20, &offset, &length));
    CHECK_EQUAL(offset, 300 * REGION);
    CHECK_EQUAL(length, 10 * REGION);
    CHECK(!dirty_map_find(&m, 310 * REGION, 1 << 20, &offset, &length));
    dirty_map_set(&m, 1000 * REGION + 511, 1);
    CHECK(dirty_map_find(&m, 310 * REGION, 1 << 20, &offset, &length)); /* not beyond the disk's end */
    CHECK_EQUAL(offset, 1000 * REGION);
    CHECK_EQUAL(length, 512);
    CHECK(dirty_map_find(&m, 10 * REGION, 1, &offset, &length)); /* at least a region */
    CHECK_EQUAL(length, REGION);
    dirty_map_free(&m);
}

/* What lies beyond the new end is clean for good: also when the map grows over it again. */
static void shrunk(uint64_t to, uint64_t regions)
{
    struct dirty_map m;
    uint64_t offset, length;
    CHECK_EQUAL(dirty_map_init(&m, 200 * REGION, REGION), 0);
    dirty_map_set_all(&m);
    dirty_map_shrink(&m, to);
    CHECK_EQUAL(m.regions, regions);
    CHECK_EQUAL(m.capacity_bytes, to);
    CHECK_EQUAL(m.dirty, regions);
    CHECK(dirty_map_all_dirty(&m, 0, to));
    CHECK(dirty_map_find(&m, (regions - 1) * REGION, 1 << 20, &offset, &length));
    CHECK_EQUAL(length, to - (regions - 1) * REGION); /* not beyond the end */
    CHECK_EQUAL(dirty_map_grow(&m, 200 * REGION), 0);
    CHECK_EQUAL(m.dirty, regions);
    CHECK(!dirty_map_any_dirty(&m, regions * REGION, (200 - regions) * REGION));
    dirty_map_free(&m);
}

static void shrinking(void)
{
    shrunk(128 * REGION, 128);
    shrunk(100 * REGION, 100);
    shrunk(63 * REGION + 512, 64); /* a region that the end cuts keeps its bit */
    shrunk(REGION, 1);
}

int main(void)
{
    test("runs", runs);
    test("shrinking", shrinking);
    test("at random, against an array", at_random);
    return tests_end();
}
