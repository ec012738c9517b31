/* SPDX-License-Identifier: Apache-2.0
 *
 * The throttle in a simulated world: a log, a destination that drains it at
 * some rate, and a guest that writes whenever it may.
 */
#include "throttle.h"

#include "harness.h"

#define MIB (1ull << 20)
#define LOG (64 * MIB)
#define MS 1000000ull

struct world {
    struct throttle t;
    uint64_t now, used;
    double owed; /* what the destination has drained, in fractions of a write */
    /* Observed. */
    uint64_t written, longest_wait, waited_since, most_used;
    uint64_t lag_bound_ns;
    double drain; /* bytes per ns */
};

static struct world begin_world(double drain, uint64_t max_lag_ns)
{
    struct world w = {.now = 12345 * MS, .drain = drain, .lag_bound_ns = max_lag_ns};
    throttle_init(&w.t, LOG, max_lag_ns);
    return w;
}

/* What is in the log has been there for as long as it takes to drain it. */
static uint64_t lag_of(const struct world *w)
{
    return w->lag_bound_ns && w->used ? (uint64_t)((double)w->used / w->drain) : 0;
}

static void run(struct world *w, uint64_t for_ns, uint64_t write_bytes, uint64_t offered_bytes_per_ms)
{
    const uint64_t step = 20000;
    uint64_t end = w->now + for_ns, offered = 0;
    w->written = w->longest_wait = w->most_used = 0;
    w->waited_since = w->now;
    for (; w->now < end; w->now += step) {
        w->owed += w->drain * (double)step;
        while (w->used >= write_bytes && w->owed >= (double)write_bytes) {
            w->owed -= (double)write_bytes;
            w->used -= write_bytes;
            throttle_drained(&w->t, write_bytes, w->now);
        }
        if (w->used == 0)
            w->owed = 0;
        offered += offered_bytes_per_ms * step / MS;
        while (offered >= write_bytes && w->used + write_bytes <= LOG &&
               throttle_wait_ns(&w->t, w->used, lag_of(w), w->now) == 0) {
            throttle_admitted(&w->t, write_bytes);
            offered -= write_bytes;
            w->used += write_bytes;
            w->written += write_bytes;
            w->waited_since = w->now;
        }
        if (offered < write_bytes)
            w->waited_since = w->now; /* it waits for nobody */
        if (w->now - w->waited_since > w->longest_wait)
            w->longest_wait = w->now - w->waited_since;
        if (w->used > w->most_used)
            w->most_used = w->used;
    }
}

static void bounds(void)
{
    struct throttle t;
    throttle_init(&t, LOG, 500 * MS);
    for (int i = 0; i < 1000; i++) {
        CHECK_EQUAL(throttle_wait_ns(&t, LOG / 2 - 1, 0, 1000 * MS), 0); /* under half: free, whatever went before */
        throttle_admitted(&t, MIB);
    }
    CHECK(throttle_wait_ns(&t, LOG, 0, 1000 * MS) == UINT64_MAX);
    CHECK(throttle_wait_ns(&t, 0, 500 * MS, 1000 * MS) == UINT64_MAX);
    CHECK(throttle_wait_ns(&t, 0, 501 * MS, 1000 * MS) == UINT64_MAX);
    CHECK_EQUAL(throttle_wait_ns(&t, 0, 249 * MS, 1000 * MS), 0);
    throttle_init(&t, LOG, 0); /* no bound in time */
    CHECK_EQUAL(throttle_wait_ns(&t, 0, UINT64_MAX, 1000 * MS), 0);
}

static void waits_are_useful(void)
{
    struct throttle t;
    throttle_init(&t, LOG, 0);
    for (uint64_t full = 52; full < 100; full += 4) {
        throttle_wait_ns(&t, LOG / 100 * full, 0, 1000 * MS);
        throttle_admitted(&t, 8 * MIB);
        uint64_t wait = throttle_wait_ns(&t, LOG / 100 * full, 0, 1000 * MS);
        CHECK(wait >= 10000 && wait <= 1000 * MS); /* neither a spin nor for ever */
    }
}

/* In the long run as much goes in as comes out, near three quarters, and nobody waits long for the next write. */
static void settles(double drain, uint64_t write_bytes, uint64_t max_lag_ns)
{
    struct world w = begin_world(drain, max_lag_ns);
    double bound = max_lag_ns && (double)max_lag_ns * drain < (double)LOG ? (double)max_lag_ns * drain : (double)LOG;
    uint64_t offered = (uint64_t)(drain * 4 * (double)MS);
    run(&w, 4000 * MS, write_bytes, offered);
    run(&w, 2000 * MS, write_bytes, offered);
    double rate = (double)w.written / 2e9;
    CHECK(rate > 0.9 * drain && rate < 1.1 * drain);
    CHECK((double)w.most_used < 0.9 * bound + (double)write_bytes);
    CHECK((double)w.used > 0.5 * bound - 2 * (double)write_bytes);
    CHECK(w.longest_wait < 3 * MS + 3 * (uint64_t)((double)write_bytes / drain));
}

static void settles_by_bytes(void)
{
    settles(0.2, 4096, 0); /* 200 MB/s */
    settles(0.2, 65536, 0);
    settles(2.0, 65536, 0);
    settles(0.2, MIB, 0);
}

static void settles_by_time(void)
{
    settles(0.05, 4096, 500 * MS); /* 25 MB are half a second */
    settles(0.05, 65536, 500 * MS);
    settles(0.02, 65536, 500 * MS);
}

/* A guest that writes less than the destination takes never waits. */
static void fast_enough(void)
{
    struct world w = begin_world(0.5, 500 * MS);
    run(&w, 2000 * MS, 65536, (uint64_t)(0.4 * (double)MS));
    CHECK(w.written > (uint64_t)(0.39 * 2e9));
    CHECK(w.longest_wait < MS);
    CHECK(w.most_used < LOG / 4);
}

/* The destination slows to a tenth: the guest follows without a stop of its own. */
static void slows_down(void)
{
    struct world w = begin_world(1.0, 0);
    run(&w, 3000 * MS, 65536, (uint64_t)(4.0 * (double)MS));
    w.drain = 0.1;
    run(&w, 3000 * MS, 65536, (uint64_t)(4.0 * (double)MS));
    CHECK(w.longest_wait < 200 * MS);
    run(&w, 2000 * MS, 65536, (uint64_t)(4.0 * (double)MS));
    CHECK((double)w.written / 2e9 > 0.09 && (double)w.written / 2e9 < 0.11);
}

int main(void)
{
    test("bounds", bounds);
    test("waits are useful", waits_are_useful);
    test("settles by bytes", settles_by_bytes);
    test("settles by time", settles_by_time);
    test("fast enough", fast_enough);
    test("slows down", slows_down);
    return tests_end();
}
