/* SPDX-License-Identifier: Apache-2.0
 *
 * Limits in a simulated world: a guest that asks for as much as it may, and a clock that is moved by hand.
 */
#include "rate_limit.h"

#include "harness.h"

#define KIB 1024ull
#define MIB (1ull << 20)
#define MS 1000000ull
#define S (1000 * MS)

static struct vs_limits no_limits(void)
{
    return (struct vs_limits){0};
}

static struct vs_limits limit(enum vs_limited kind, uint64_t per_s)
{
    struct vs_limits limits = no_limits();
    limits.rate[kind].per_s = per_s;
    return limits;
}

static struct rate_limit begin_limit(const struct vs_limits *limits, uint64_t now)
{
    struct rate_limit l = {0};
    CHECK(rate_limit_possible(limits));
    rate_limit_set(&l, limits, now);
    return l;
}

/* What a guest that always has more to do gets done from now until then. It looks again no earlier than it was told,
 * but up to "late" later. */
static uint64_t run(struct rate_limit *l, bool writes, uint64_t bytes, uint64_t *now, uint64_t until, uint64_t late)
{
    uint64_t done = 0, state = 11;
    while (*now < until) {
        uint64_t wait = rate_limit_wait_ns(l, writes, *now);
        if (wait) {
            *now += wait + (late ? test_random(&state) % late : 0);
            continue;
        }
        rate_limit_charge(l, writes, bytes);
        done++;
    }
    return done;
}

/* Over ten seconds, a limit is kept to within what a bucket holds and the last request. */
static void keeps_the_rate(void)
{
    static const uint64_t sizes[] = {512, 4 * KIB, 64 * KIB, MIB, 256 * MIB};
    static const uint64_t rates[] = {1000, 100 * KIB, 7 * MIB, 1000 * MIB};
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (unsigned k = 0; k < sizeof rates / sizeof *rates; k++) {
            for (unsigned late = 0; late < 2; late++) {
                struct vs_limits limits = limit(VS_BPS_WR, rates[k]);
                uint64_t now = 5 * S;
                struct rate_limit l = begin_limit(&limits, now);
                double allowed = (double)rates[k] * 10;
                double done = (double)run(&l, true, sizes[i], &now, 15 * S, late * 3 * MS) * (double)sizes[i];
                CHECK(done <= allowed + (double)rates[k] / 10 + (double)sizes[i]);
                CHECK(done >= allowed * 0.999 - (double)sizes[i]);
            }
        }
    }
}

static void requests_count_whatever_their_size(void)
{
    for (uint64_t bytes = 512; bytes <= 16 * MIB; bytes *= 32) {
        struct vs_limits limits = limit(VS_IOPS, 500);
        uint64_t now = 0, done;
        struct rate_limit l = begin_limit(&limits, now);
        done = run(&l, bytes % 3 == 0, bytes, &now, 10 * S, 0);
        CHECK(done >= 4999 && done <= 5000 + 50 + 1);
    }
}

static void large_requests_count_as_several(void)
{
    struct vs_limits limits = limit(VS_IOPS, 500);
    uint64_t now = 0, done;
    struct rate_limit l;
    limits.iops_size = 64 * KIB;
    l = begin_limit(&limits, now);
    done = run(&l, true, 160 * KIB, &now, 10 * S, 0); /* 2.5 each */
    CHECK(done >= 1999 && done <= 2000 + 20 + 1);
    l = begin_limit(&limits, now = 0);
    done = run(&l, true, 4 * KIB, &now, 10 * S, 0); /* never less than one */
    CHECK(done >= 4999 && done <= 5000 + 50 + 1);
}

/* Each limit counts its own; all of them hold at once. */
static void directions(void)
{
    struct vs_limits limits = limit(VS_BPS_RD, MIB);
    uint64_t now = 0;
    struct rate_limit l = begin_limit(&limits, now);
    for (int i = 0; i < 1000; i++) {
        CHECK_EQUAL(rate_limit_wait_ns(&l, true, now), 0);
        rate_limit_charge(&l, true, 64 * MIB);
    }
    CHECK_EQUAL(rate_limit_wait_ns(&l, false, now), 0);
    rate_limit_charge(&l, false, 64 * MIB);
    CHECK(rate_limit_wait_ns(&l, false, now) > 63 * S);
    CHECK_EQUAL(rate_limit_wait_ns(&l, true, now), 0);

    limits = limit(VS_BPS, 10 * MIB);
    limits.rate[VS_IOPS_WR].per_s = 10;
    l = begin_limit(&limits, now);
    rate_limit_charge(&l, false, MIB + 1); /* over what the bucket of both holds, by a byte */
    CHECK(rate_limit_wait_ns(&l, false, now) > 0 && rate_limit_wait_ns(&l, true, now) > 0);
    now += MS;
    CHECK_EQUAL(rate_limit_wait_ns(&l, true, now), 0);
    rate_limit_charge(&l, true, 512);
    rate_limit_charge(&l, true, 512);
    CHECK_EQUAL(rate_limit_wait_ns(&l, false, now), 0);
    CHECK(rate_limit_wait_ns(&l, true, now) > 90 * MS); /* the slower one of its limits decides */
}

/* Ten times the rate for five seconds, then the rate; and an idle time earns that again, but never more. */
static void bursts(void)
{
    struct vs_limits limits = limit(VS_IOPS, 100);
    uint64_t now = 0, done;
    struct rate_limit l;
    limits.rate[VS_IOPS].burst = 1000;
    limits.rate[VS_IOPS].length_s = 5;
    l = begin_limit(&limits, now);
    for (int round = 0; round < 3; round++) {
        uint64_t began = now;
        done = run(&l, true, 4096, &now, began + 4 * S, 0);
        CHECK(done >= 3999 && done <= 4000 + 100 + 1); /* no faster than its rate, but for a tenth of a second */
        done += run(&l, true, 4096, &now, began + 10 * S, 0);
        CHECK(done >= 5000 && done <= 5000 + 1000 + 100 + 1); /* what the bucket holds, and what leaks meanwhile */
        done = run(&l, true, 4096, &now, now + 10 * S, 0);
        CHECK(done >= 999 && done <= 1001);
        now += 3600 * S;
    }
}

/* A burst of one second may go all at once, as in QEMU. */
static void short_burst(void)
{
    struct vs_limits limits = limit(VS_BPS_WR, MIB);
    uint64_t now = 0, done = 0;
    struct rate_limit l;
    limits.rate[VS_BPS_WR].burst = 8 * MIB;
    limits.rate[VS_BPS_WR].length_s = 1;
    l = begin_limit(&limits, now);
    while (rate_limit_wait_ns(&l, true, now) == 0) {
        rate_limit_charge(&l, true, 4096);
        done += 4096;
    }
    CHECK_EQUAL(done, 8 * MIB + 4096);
}

/* Time in which nobody asked, or the process was stopped, earns no more than a bucket. */
static void no_burst_after_a_gap(void)
{
    struct vs_limits limits = limit(VS_IOPS, 1000);
    uint64_t now = 0, done = 0;
    struct rate_limit l = begin_limit(&limits, now);
    run(&l, true, 4096, &now, S, 0);
    now += 86400 * S;
    while (rate_limit_wait_ns(&l, true, now) == 0) {
        rate_limit_charge(&l, true, 4096);
        done++;
    }
    CHECK_EQUAL(done, 101);
}

/* A change gives nothing away, and nobody waits for a rate that does not hold any more. */
static void changed_while_in_use(void)
{
    struct vs_limits limits = limit(VS_BPS_WR, 100 * MIB), slow = limit(VS_BPS_WR, 1);
    uint64_t now = 0, done = 0;
    struct rate_limit l = begin_limit(&limits, now);
    run(&l, true, 4096, &now, 2 * S, 0);
    for (int i = 0; i < 1000; i++) {
        rate_limit_set(&l, &limits, now);
        for (; rate_limit_wait_ns(&l, true, now) == 0; done++)
            rate_limit_charge(&l, true, 4096);
    }
    CHECK(done <= 1001);
    rate_limit_set(&l, &slow, now);
    rate_limit_charge(&l, true, 256 * MIB);
    CHECK(rate_limit_wait_ns(&l, true, now) > 200000000ull * S);
    rate_limit_set(&l, &limits, now);
    CHECK(rate_limit_wait_ns(&l, true, now) <= MS);
    limits = no_limits();
    rate_limit_set(&l, &limits, now);
    CHECK(!l.on && rate_limit_wait_ns(&l, true, now) == 0);
    rate_limit_charge(&l, true, 256 * MIB);
    CHECK_EQUAL(rate_limit_wait_ns(&l, true, now), 0);
}

static bool possible(uint64_t per_s, uint64_t burst, uint64_t length_s)
{
    struct vs_limits limits = no_limits();
    limits.rate[VS_IOPS_RD] = (struct vs_rate){per_s, burst, length_s};
    return rate_limit_possible(&limits);
}

static void what_is_possible(void)
{
    CHECK(possible(0, 0, 0) && possible(0, 0, 1) && possible(1, 0, 1) && possible(RATE_MAX, 0, 0));
    CHECK(possible(1, 1, 1) && possible(1, 10, 60) && possible(1, RATE_MAX, 1) && possible(1, 1, RATE_MAX));
    CHECK(!possible(RATE_MAX + 1, 0, 1) && !possible(UINT64_MAX, 0, 1)); /* a rate of too much */
    CHECK(!possible(0, 1, 1));                                           /* a burst of no limit */
    CHECK(!possible(10, 9, 1));                                          /* slower than the limit */
    CHECK(!possible(10, 20, 0) && !possible(10, 0, 2));                  /* of no length, a length of none */
    CHECK(!possible(1, RATE_MAX, 2) && !possible(1, 2, RATE_MAX) && !possible(1, UINT64_MAX, UINT64_MAX));
}

int main(void)
{
    test("keeps the rate", keeps_the_rate);
    test("requests count whatever their size", requests_count_whatever_their_size);
    test("large requests count as several", large_requests_count_as_several);
    test("directions", directions);
    test("bursts", bursts);
    test("short burst", short_burst);
    test("no burst after a gap", no_burst_after_a_gap);
    test("changed while in use", changed_while_in_use);
    test("what is possible", what_is_possible);
    return tests_end();
}
