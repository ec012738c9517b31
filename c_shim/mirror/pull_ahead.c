/* SPDX-License-Identifier: Apache-2.0
 *
 * Ahead of a destination that is too slow (on_congestion=pull-ahead).
 *
 *   steady, syncing --the log fills, or lags--> ahead --catch up--> syncing
 *
 * Invariants:
 *   - From the move to ahead on no write enters the log, not even one that was
 *     captured and is at the source: a later one may have completed before it,
 *     and is not in the log. So what the log brings to the destination are the
 *     writes 1 .. G as G was then, and, if it was steady, no flush that was
 *     confirmed is missing of them: a moment T of the source.
 *   - Whoever waits for the count check is held until the state record says
 *     "outdated" (RECORD_PENDING, as when a destination fails).
 *   - Every write marks its region as different (difference.c), as ever. When
 *     the log is on the destination and the last region copies too, a checkpoint
 *     flushes both disks and finds equal whatever was not written since: that is
 *     the progress that is kept. Only then the control plane is told, records
 *     that the destination is about to become inconsistent, and lets it catch up.
 *   - Catching up copies what differs, once: capture is on again, and dirty bits
 *     only fall (copier.c). The copy gives way: while the log fills it begins no
 *     region, so the log drains whenever the guest writes less than the
 *     destination takes, and the copy ends. If the guest writes more, the
 *     mirror is ahead again. How soon it may catch up then doubles each time,
 *     until it was steady for a good while.
 *
 * The log in time counts in steady only, and only once it was short: what is
 * left in it when a copy ends is no reason to be ahead at once. A switch that
 * holds the guest is left alone: it has its own bound.
 */
#include "pull_ahead.h"

#include <errno.h>

#include "attachment.h"
#include "engine.h"

/* In units of the first back-off: the longest one, and what is a good while of steady. */
#define BACKOFF_MAX 60u
#define STEADY_WHILE 10u
/* The copy gives way above this part of the fill threshold. */
#define COPY_FILL 4u

static uint64_t lag_ns(const struct vs_engine *e)
{
    uint64_t oldest_ns = log_oldest_ns(&e->log);
    return oldest_ns && oldest_ns < engine_now(e) ? engine_now(e) - oldest_ns : 0;
}

static uint64_t lag_max_ns(const struct vs_engine *e)
{
    return e->config.max_lag_us * 1000;
}

void pull_ahead_reset(struct vs_engine *e)
{
    e->ahead = (struct pull_ahead){0};
}

bool pull_ahead_may_be_steady(const struct vs_engine *e)
{
    return !e->config.pull_ahead || lag_ns(e) < lag_max_ns(e) / 2;
}

void pull_ahead_steady(struct vs_engine *e)
{
    e->ahead.steady_since_ns = engine_now(e);
    e->ahead.lag_counts = false;
}

uint64_t pull_ahead_wait_ns(const struct vs_engine *e)
{
    return ring_used(&e->log.ring) < e->config.congestion_fill_bytes ? 0 : UINT64_MAX;
}

bool pull_ahead_log_fills(const struct vs_engine *e)
{
    return e->config.pull_ahead && ring_used(&e->log.ring) >= e->config.congestion_fill_bytes / COPY_FILL;
}

/* ---- getting ahead ------------------------------------------------------- */

static bool congested(const struct vs_engine *e)
{
    if (!e->config.pull_ahead || !e->mirror.capturing || !engine_takes_up(e))
        return false;
    return e->throttled_since_ns || ring_used(&e->log.ring) >= e->config.congestion_fill_bytes ||
           (e->mirror.state == VS_STEADY && e->ahead.lag_counts && lag_ns(e) >= lag_max_ns(e));
}

static void back_off(struct vs_engine *e)
{
    struct pull_ahead *a = &e->ahead;
    uint64_t first_ns = e->config.ahead_backoff_us * 1000, units;
    if (a->consistent && engine_now(e) - a->steady_since_ns >= STEADY_WHILE * first_ns)
        a->times = 0;
    units = a->times == 0 ? 0 : a->times > 6 ? BACKOFF_MAX : 1u << (a->times - 1);
    if (a->times <= 6)
        a->times++;
    a->not_before_ns = engine_now(e) + units * first_ns;
}

static void get_ahead(struct vs_engine *e)
{
    struct pull_ahead *a = &e->ahead;
    a->consistent = e->mirror.state == VS_STEADY;
    a->drained = false;
    a->since_ns = engine_now(e);
    a->generation = e->counts.source_generation;
    a->bytes = 0;
    back_off(e);
    mirror_stop_capture(e);
    difference_pull_ahead(e);
    if (a->consistent)
        e->mirror.record = RECORD_PENDING;
    mirror_set_state(e, VS_AHEAD, VS_REASON_CONGESTION, 0);
    if (a->consistent)
        mirror_post(e, VS_EV_DEGRADED, VS_REASON_CONGESTION, 0);
}

/* ---- catching up --------------------------------------------------------- */

/* All that was on its way is on the destination, and was flushed. */
static bool is_drained(const struct vs_engine *e)
{
    return log_drained(&e->log) && e->replicator.in_use == 0 && e->copier.in_use == 0 && e->verifier.in_use == 0 &&
           difference_at_rest(e);
}

static void tell_drained(struct vs_engine *e)
{
    struct pull_ahead *a = &e->ahead;
    uint64_t now = engine_now(e);
    struct vs_event event = {.kind = VS_EV_AHEAD_DRAINED, .value = a->not_before_ns > now ? a->not_before_ns - now : 0};
    a->drained = true;
    mailbox_post(&e->mailbox, &event);
}

int pull_ahead_catch_up(struct vs_engine *e)
{
    if (e->mirror.state != VS_AHEAD)
        return -ENOTCONN;
    if (!e->ahead.drained || e->mirror.record != RECORD_WRITTEN)
        return -EBUSY;
    if (engine_now(e) < e->ahead.not_before_ns)
        return -EAGAIN;
    e->mirror.capturing = true;
    copier_start(e);
    mirror_set_state(e, VS_SYNCING, VS_REASON_CATCH_UP, 0);
    return 0;
}

void pull_ahead_pump(struct vs_engine *e)
{
    if (lag_ns(e) < lag_max_ns(e) / 2)
        e->ahead.lag_counts = true;
    if (congested(e))
        get_ahead(e);
    if (e->mirror.state == VS_AHEAD && !e->ahead.drained && is_drained(e))
        tell_drained(e);
}

uint64_t pull_ahead_deadline_ns(const struct vs_engine *e)
{
    uint64_t oldest_ns = log_oldest_ns(&e->log);
    bool waits = e->config.pull_ahead && e->mirror.state == VS_STEADY && e->ahead.lag_counts && engine_takes_up(e);
    return waits && oldest_ns ? oldest_ns + lag_max_ns(e) : UINT64_MAX;
}

struct lag pull_ahead_lag(const struct vs_engine *e)
{
    struct lag lag = {e->log.lag_bytes, log_lag_writes(&e->log), lag_ns(e)};
    if (e->mirror.state != VS_AHEAD)
        return lag;
    lag.bytes += e->ahead.bytes;
    lag.writes += e->counts.source_generation - e->ahead.generation;
    if (lag.ns == 0)
        lag.ns = engine_now(e) - e->ahead.since_ns;
    return lag;
}
