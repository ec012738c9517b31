/* SPDX-License-Identifier: Apache-2.0 */
#include "activity_log.h"

#include "harness.h"

#define MIB (1ull << 20)
enum { EXTENTS = 8, DISK_EXTENTS = 40 };

static bool lists(const struct activity_log *l, uint64_t extent)
{
    uint64_t all[EXTENTS], count = activity_log_list(l, all);
    for (uint64_t i = 0; i < count; i++)
        if (all[i] == extent)
            return true;
    return false;
}

static void activate(struct activity_log *l, uint64_t extent)
{
    bool evicted = false;
    activity_log_plan(l);
    CHECK(activity_log_add(l, extent * MIB, 1, &evicted));
    activity_log_commit(l);
}

static void a_write_waits_for_the_durable_log(void)
{
    struct activity_log l;
    bool evicted = false;
    CHECK_EQUAL(activity_log_init(&l, EXTENTS, MIB), 0);
    CHECK(!activity_log_hold(&l, 0, 1));
    activity_log_plan(&l);
    CHECK(activity_log_add(&l, 0, 1, &evicted));
    CHECK(lists(&l, 0));
    CHECK(!activity_log_hold(&l, 0, 1)); /* coming */
    activity_log_commit(&l);
    CHECK(activity_log_hold(&l, 0, 1));
    CHECK(!activity_log_hold(&l, MIB - 1, 2)); /* half of it is not */
    CHECK(activity_log_hold(&l, MIB - 1, 1));
    CHECK(!evicted);
    activity_log_free(&l);
}

static void what_is_written_to_stays(void)
{
    struct activity_log l;
    bool evicted = false;
    CHECK_EQUAL(activity_log_init(&l, EXTENTS, MIB), 0);
    for (uint64_t e = 0; e < EXTENTS; e++)
        activate(&l, e);
    for (uint64_t e = 0; e < EXTENTS; e++)
        CHECK(activity_log_hold(&l, e * MIB, 1));
    activity_log_plan(&l);
    CHECK(!activity_log_add(&l, 20 * MIB, 1, &evicted));
    CHECK(!evicted && !lists(&l, 20));
    activity_log_release(&l, 3 * MIB, 1);
    CHECK(activity_log_add(&l, 20 * MIB, 1, &evicted));
    CHECK(evicted && lists(&l, 20) && !lists(&l, 3));
    activity_log_free(&l);
}

static void the_least_recently_used_leaves(void)
{
    struct activity_log l;
    bool evicted = false;
    CHECK_EQUAL(activity_log_init(&l, EXTENTS, MIB), 0);
    for (uint64_t e = 0; e < EXTENTS; e++)
        activate(&l, e);
    CHECK(activity_log_hold(&l, 0, 1));
    activity_log_release(&l, 0, 1);
    activity_log_plan(&l);
    CHECK(activity_log_add(&l, 30 * MIB, 1, &evicted));
    CHECK(evicted && lists(&l, 0) && !lists(&l, 1) && lists(&l, 2));
    activity_log_free(&l);
}

static void one_plan_does_not_evict_what_it_needs(void)
{
    struct activity_log l;
    bool evicted = false;
    CHECK_EQUAL(activity_log_init(&l, EXTENTS, MIB), 0);
    for (uint64_t e = 0; e < EXTENTS; e++)
        activate(&l, e);
    activity_log_plan(&l);
    CHECK(activity_log_add(&l, 0, MIB + 1, &evicted)); /* 0 and 1, both there */
    CHECK(!evicted);
    CHECK(activity_log_add(&l, 30 * MIB, 6 * MIB, &evicted));
    CHECK(lists(&l, 0) && lists(&l, 1) && lists(&l, 35) && !lists(&l, 2));
    CHECK(!activity_log_add(&l, 10 * MIB, 1, &evicted));
    activity_log_free(&l);
}

/* Against sets: what is held is listed, nothing is held that was not committed. */
static void at_random(void)
{
    struct activity_log l;
    uint64_t seed = 7, held_at[64], held_bytes[64], durable[EXTENTS], durable_count = 0;
    unsigned held = 0;
    CHECK_EQUAL(activity_log_init(&l, EXTENTS, MIB), 0);
    for (int step = 0; step < 20000; step++) {
        uint64_t at = test_random(&seed) % (DISK_EXTENTS * MIB), bytes = 1 + test_random(&seed) % (2 * MIB);
        bool evicted = false;
        if (held < 6 && activity_log_hold(&l, at, bytes)) {
            for (uint64_t e = at / MIB; e <= (at + bytes - 1) / MIB; e++) {
                bool found = false;
                for (uint64_t i = 0; i < durable_count; i++)
                    found |= durable[i] == e;
                CHECK(found);
            }
            held_at[held] = at;
            held_bytes[held++] = bytes;
        } else if (held && test_random(&seed) % 2) {
            held--;
            activity_log_release(&l, held_at[held], held_bytes[held]);
        } else {
            activity_log_plan(&l);
            (void)activity_log_add(&l, at, bytes, &evicted);
            for (unsigned i = 0; i < held; i++)
                for (uint64_t e = held_at[i] / MIB; e <= (held_at[i] + held_bytes[i] - 1) / MIB; e++)
                    CHECK(lists(&l, e));
            durable_count = activity_log_list(&l, durable);
            activity_log_commit(&l);
        }
    }
    activity_log_free(&l);
}

int main(void)
{
    test("a_write_waits_for_the_durable_log", a_write_waits_for_the_durable_log);
    test("what_is_written_to_stays", what_is_written_to_stays);
    test("the_least_recently_used_leaves", the_least_recently_used_leaves);
    test("one_plan_does_not_evict_what_it_needs", one_plan_does_not_evict_what_it_needs);
    test("at_random", at_random);
    return tests_end();
}
