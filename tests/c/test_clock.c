/* SPDX-License-Identifier: Apache-2.0
 *
 * What is forgiven to a thread that was stopped, and what is not to one that is slow.
 */
#include "clock.h"

#include "harness.h"

#define MS 1000000ull
#define S 1000000000ull

static void what_was_slept_is_no_gap(void)
{
    struct clock_gaps g = {0};
    CHECK_EQUAL(clock_gap_ns(&g, 10 * S, UINT64_MAX), 0);
    CHECK_EQUAL(clock_gap_ns(&g, 250 * MS, 250 * MS), 0);
    CHECK_EQUAL(clock_gap_ns(&g, 500 * MS, 250 * MS), 0);
    CHECK_EQUAL(clock_gap_ns(&g, 3 * S, 250 * MS), 2750 * MS);
}

static void a_stop_is_forgiven_however_long(void)
{
    struct clock_gaps g = {0};
    for (int i = 0; i < 100; i++) {
        CHECK_EQUAL(clock_gap_ns(&g, 86400 * S, 0), 86400 * S);
        for (int pass = 0; pass < 1000; pass++)
            CHECK_EQUAL(clock_gap_ns(&g, 1 * MS, 0), 0);
    }
}

/* Each pass is late: a deadline of 30 s must come. */
static void slowness_is_not_forgiven(void)
{
    for (uint64_t pass_ns = 251 * MS; pass_ns <= 16 * S; pass_ns *= 2) {
        struct clock_gaps g = {0};
        uint64_t real_ns = 0, own_ns = 0;
        while (own_ns < 30 * S) {
            own_ns += pass_ns - clock_gap_ns(&g, pass_ns, 0);
            real_ns += pass_ns;
            CHECK(real_ns <= 30 * S + (CLOCK_GAPS_IN_A_ROW + 1) * pass_ns);
        }
    }
}

/* Late in every other pass: of what it does in time, each second earns it one gap. */
static void slowness_now_and_then(void)
{
    struct clock_gaps g = {0};
    uint64_t forgiven = 0;
    for (int i = 0; i < 4000; i++) {
        forgiven += clock_gap_ns(&g, 400 * MS, 0) > 0;
        CHECK_EQUAL(clock_gap_ns(&g, 100 * MS, 100 * MS), 0);
    }
    CHECK(forgiven <= CLOCK_GAPS_IN_A_ROW + 400);
    CHECK(forgiven >= 400);
}

int main(void)
{
    test("what was slept is no gap", what_was_slept_is_no_gap);
    test("a stop is forgiven, however long", a_stop_is_forgiven_however_long);
    test("slowness is not forgiven", slowness_is_not_forgiven);
    test("slowness now and then", slowness_now_and_then);
    return tests_end();
}
