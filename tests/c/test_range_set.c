/* SPDX-License-Identifier: Apache-2.0 */
#include "range_set.h"

#include "harness.h"

enum { BLOCKS = 400 };

static struct range_set d;
static bool bad[BLOCKS]; /* what is in doubt for certain */

static void well_formed(void)
{
    CHECK(d.count <= VS_RANGES_MAX);
    for (uint32_t i = 0; i < d.count; i++) {
        CHECK(d.range[i].length > 0);
        CHECK(i == 0 || d.range[i - 1].offset + d.range[i - 1].length < d.range[i].offset);
    }
}

static void exact(void)
{
    d.count = 0;
    range_set_add(&d, 100, 10);
    range_set_add(&d, 50, 10);
    well_formed();
    CHECK_EQUAL(d.count, 2);
    CHECK(range_set_overlaps(&d, 59, 1) && !range_set_overlaps(&d, 60, 40) && range_set_overlaps(&d, 0, 1000));
    range_set_add(&d, 60, 40); /* closes the gap */
    CHECK_EQUAL(d.count, 1);
    CHECK_EQUAL(d.range[0].offset, 50);
    CHECK_EQUAL(d.range[0].length, 60);
    range_set_clear(&d, 70, 10); /* cut in two */
    well_formed();
    CHECK_EQUAL(d.count, 2);
    CHECK(!range_set_overlaps(&d, 70, 10) && range_set_overlaps(&d, 69, 1) && range_set_overlaps(&d, 80, 1));
    range_set_clear(&d, 0, 1000);
    CHECK_EQUAL(d.count, 0);
    CHECK(!range_set_overlaps(&d, 0, UINT64_MAX));
}

/* Full: it forgets borders, never doubt. */
static void full(void)
{
    d.count = 0;
    for (uint64_t i = 0; i < 3 * VS_RANGES_MAX; i++) {
        range_set_add(&d, i * 100, 10);
        well_formed();
        for (uint64_t j = 0; j <= i; j++)
            CHECK(range_set_overlaps(&d, j * 100, 1) && range_set_overlaps(&d, j * 100 + 9, 1));
    }
    CHECK_EQUAL(d.count, VS_RANGES_MAX);
    /* No room to cut one in two: it stays whole. */
    uint64_t middle = d.range[5].offset + d.range[5].length / 2;
    range_set_clear(&d, middle, 1);
    well_formed();
    CHECK(range_set_overlaps(&d, middle - 1, 1) && range_set_overlaps(&d, middle + 1, 1));
}

/* With few ranges it is exact; with many it may say more, never less. */
static void at_random(int span, bool is_exact)
{
    uint64_t state = 11 + (uint64_t)span;
    d.count = 0;
    memset(bad, 0, sizeof bad);
    for (int step = 0; step < 20000; step++) {
        uint64_t offset = test_random(&state) % BLOCKS;
        uint64_t length = 1 + test_random(&state) % (uint64_t)span;
        bool add = test_random(&state) % 2;
        if (offset + length > BLOCKS)
            length = BLOCKS - offset;
        (add ? range_set_add : range_set_clear)(&d, offset, length);
        memset(bad + offset, add, length);
        well_formed();
        for (uint64_t b = 0; b < BLOCKS; b++) {
            bool said = range_set_overlaps(&d, b, 1);
            CHECK(said || !bad[b]);
            CHECK(!is_exact || said == bad[b]);
        }
        if (add)
            CHECK(range_set_overlaps(&d, offset, length));
    }
}

static void few(void)
{
    at_random(60, true);
}

static void many(void)
{
    at_random(2, false);
}

int main(void)
{
    test("ranges join and are cut", exact);
    test("full: errs on the side of doubt", full);
    test("at random, few long ranges", few);
    test("at random, many short ranges", many);
    return tests_end();
}
