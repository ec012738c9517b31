/* SPDX-License-Identifier: Apache-2.0 */
#include "bad_ranges.h"

#include "harness.h"

static struct bad_ranges b;
static struct vs_counts steady, unknown;

static void begin_ranges(void)
{
    b = (struct bad_ranges){0};
    unknown = (struct vs_counts){.source_generation = 10};
    steady =
        (struct vs_counts){.source_generation = 10, .writes_mirrored = 9, .writes_flushed = 9, .mirrored_known = 1};
}

static bool spared(uint64_t offset)
{
    return range_set_overlaps(&b.spared, offset, 1);
}

static void doubt_until_it_is_written(void)
{
    begin_ranges();
    CHECK(!bad_ranges_any(&b));
    bad_ranges_write_failed(&b, 100, 10, false, &unknown);
    CHECK(bad_ranges_any(&b) && bad_ranges_overlap(&b, 109, 1) && !bad_ranges_overlap(&b, 110, 1));
    bad_ranges_written(&b, 100, 5, 11);
    CHECK(!bad_ranges_overlap(&b, 100, 5) && bad_ranges_overlap(&b, 105, 5));
    bad_ranges_written(&b, 105, 5, 12);
    CHECK(!bad_ranges_any(&b));
}

static void spared_once_the_destination_is_durable(void)
{
    begin_ranges();
    bad_ranges_write_failed(&b, 100, 10, true, &steady);
    bad_ranges_pump(&b, &steady);
    CHECK(!spared(100)); /* it lacks the write of generation 10 */
    steady.writes_mirrored = steady.writes_flushed = 10;
    bad_ranges_pump(&b, &steady);
    CHECK(spared(100));
    bad_ranges_written(&b, 100, 10, 11);
    CHECK(!spared(100));
}

static void spared_only_if_steady_lasts_so_long(void)
{
    begin_ranges();
    bad_ranges_write_failed(&b, 100, 10, true, &steady);
    bad_ranges_leave_steady(&b, &steady);
    steady.writes_mirrored = steady.writes_flushed = 10;
    bad_ranges_pump(&b, &steady);
    CHECK(!spared(100) && bad_ranges_overlap(&b, 100, 10));
    bad_ranges_write_failed(&b, 200, 10, true, &steady);
    bad_ranges_leave_steady(&b, &steady); /* the flush was over: it counts as if it had been looked at before */
    CHECK(spared(200));
    bad_ranges_spare_none(&b);
    CHECK(!spared(200) && bad_ranges_overlap(&b, 200, 10));
}

static void unreadable_and_healed(void)
{
    begin_ranges();
    bad_ranges_not_read(&b, 300, 10);
    CHECK(bad_ranges_overlap(&b, 300, 1));
    CHECK(bad_ranges_healed(&b, &steady));
    bad_ranges_written(&b, 300, 10, 11);
    CHECK(!bad_ranges_any(&b) && !bad_ranges_healed(&b, &steady));
    steady.writes_flushed = 11;
    CHECK(bad_ranges_healed(&b, &steady));
    bad_ranges_not_read(&b, 300, 10);
    bad_ranges_copy_begins(&b);
    CHECK(!bad_ranges_any(&b));
}

static void another_source(void)
{
    struct vs_engine_config config = {.doubt_count = 1, .doubt = {{100, 10}}, .spared_count = 1, .spared = {{100, 5}}};
    begin_ranges();
    bad_ranges_load(&b, &config);
    CHECK(bad_ranges_overlap(&b, 105, 1) && spared(104) && !spared(105));
    bad_ranges_not_read(&b, 300, 10);
    bad_ranges_forget(&b);
    CHECK(!bad_ranges_any(&b) && !spared(100));
}

int main(void)
{
    test("a range is in doubt until it is written", doubt_until_it_is_written);
    test("spared once the destination is durable", spared_once_the_destination_is_durable);
    test("spared only if steady lasts so long", spared_only_if_steady_lasts_so_long);
    test("unreadable, and healed for good", unreadable_and_healed);
    test("another source", another_source);
    return tests_end();
}
