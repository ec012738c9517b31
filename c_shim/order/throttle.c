/* SPDX-License-Identifier: Apache-2.0
 *
 * How fast the guest may write while the destination lags behind. See throttle.h.
 */
#include "throttle.h"

#define WINDOW_NS 10000000u
/* A destination that was not seen draining yet: 1 MiB a second, so that a write is late but not stuck. */
#define FLOOR_BYTES_PER_NS 0.001
#define FREE_BELOW 0.5
/* Credit for this long at most: a pause earns no burst. */
#define CREDIT_NS 2000000.0
#define RETRY_MIN_NS 100000u

void throttle_init(struct throttle *t, uint64_t log_bytes, uint64_t max_lag_ns)
{
    *t = (struct throttle){.log_bytes = log_bytes, .max_lag_ns = max_lag_ns};
}

void throttle_drained(struct throttle *t, uint64_t bytes, uint64_t now_ns)
{
    uint64_t elapsed = now_ns - t->window_start_ns;
    t->window_bytes += bytes;
    if (elapsed < WINDOW_NS)
        return;
    if (elapsed < 100 * (uint64_t)WINDOW_NS) { /* otherwise there was nothing to drain for long */
        double rate = (double)t->window_bytes / (double)elapsed;
        t->drain_bytes_per_ns = t->drain_bytes_per_ns ? 0.7 * t->drain_bytes_per_ns + 0.3 * rate : rate;
    }
    t->window_start_ns = now_ns;
    t->window_bytes = 0;
}

static double fullness(const struct throttle *t, uint64_t used, uint64_t lag_ns)
{
    double by_bytes = (double)used / (double)t->log_bytes;
    double by_time = t->max_lag_ns ? (double)lag_ns / (double)t->max_lag_ns : 0;
    return by_bytes > by_time ? by_bytes : by_time;
}

uint64_t throttle_wait_ns(struct throttle *t, uint64_t log_bytes_used, uint64_t lag_ns, uint64_t now_ns)
{
    double full = fullness(t, log_bytes_used, lag_ns), rate, wait;
    uint64_t elapsed = now_ns - t->credit_at_ns;
    t->credit_at_ns = now_ns;
    if (full < FREE_BELOW) {
        t->credit_bytes = 0;
        return 0;
    }
    if (full >= 1)
        return UINT64_MAX;
    rate = t->drain_bytes_per_ns > FLOOR_BYTES_PER_NS ? t->drain_bytes_per_ns : FLOOR_BYTES_PER_NS;
    rate *= 2 * (1 - full) / (1 - FREE_BELOW);
    t->credit_bytes += rate * (double)elapsed;
    if (t->credit_bytes > rate * CREDIT_NS)
        t->credit_bytes = rate * CREDIT_NS;
    if (t->credit_bytes >= 0)
        return 0;
    wait = -t->credit_bytes / rate;
    return wait < RETRY_MIN_NS ? RETRY_MIN_NS : wait > 1e9 ? 1000000000u : (uint64_t)wait;
}

void throttle_admitted(struct throttle *t, uint64_t bytes)
{
    t->credit_bytes -= (double)bytes;
}
