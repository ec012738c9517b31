/* SPDX-License-Identifier: Apache-2.0
 *
 * The guest is pulled ahead of a destination that is too slow (on_congestion=pull-ahead): its writes do not wait, the
 * destination stays behind as a moment of the source, and catches up later.
 *
 *   steady, syncing --the log is full, or too old--> ahead --catch up--> syncing
 *
 * Invariants:
 *   - From the move to ahead on no write enters the log, not even one that was captured and is at the source: a later
 *     write may have completed before it and not be in the log. So the log brings exactly the writes 1 .. G, as G was
 *     at that moment, to the destination. If the mirror was steady, they include every flush that was confirmed: the
 *     destination becomes a moment T of the source.
 *   - Whoever waits for the count check is held until the state record says "outdated" (RECORD_PENDING, as when a
 *     destination fails).
 *   - Every write marks its region as different (difference.c), as always. When the log and the last region copies are
 *     on the destination, a checkpoint flushes both disks and finds equal whatever was not written since: this progress
 *     is kept. Only then is the control plane told. It records that the destination is about to become inconsistent,
 *     and lets it catch up.
 *   - Catching up copies what differs, once: capture is on again, and dirty bits only fall (copier.c). The copy gives
 *     way to the log: while the log fills, it begins no region. So the log drains whenever the guest writes less than
 *     the destination takes, and the copy ends. If the guest writes more, it is pulled ahead again. The time until it
 *     may catch up then doubles each time, until the mirror was steady for a good while.
 *
 * The age of the log counts in steady only, and only once the log was short: what a copy leaves in it at its end is no
 * reason to pull ahead at once. A switch that holds the guest is left alone: it has a time limit of its own.
 */
#include "pull_ahead.h"

#include <errno.h>

#include "copier.h"
#include "difference.h"
#include "guest_side.h"
#include "mailbox.h"
#include "mirror_state.h"
#include "repl_log.h"
#include "replicator.h"
#include "tap.h"
#include "uncopied.h"
#include "verifier.h"

/* In units of the first back-off: the longest one, and what is a good while of steady. */
#define BACKOFF_MAX 60u
#define STEADY_WHILE 10u

void pull_ahead_init(struct pull_ahead *a, const struct pull_ahead_rooms *rooms, const struct vs_engine_config *config)
{
    *a = (struct pull_ahead){.rooms = *rooms,
                             .enabled = config->pull_ahead,
                             .max_lag_ns = config->max_lag_us * 1000,
                             .first_backoff_ns = config->ahead_backoff_us * 1000};
}

void pull_ahead_reset(struct pull_ahead *a)
{
    a->drained = a->lag_counts = false;
    a->times = 0;
    a->since_ns = a->generation = a->not_before_ns = a->steady_since_ns = 0;
    a->rooms.tap->ahead_bytes = 0;
}

static uint64_t lag_ns(const struct pull_ahead *a)
{
    uint64_t oldest_ns = log_oldest_ns(a->rooms.log), now = a->rooms.host->now_ns;
    return oldest_ns && oldest_ns < now ? now - oldest_ns : 0;
}

bool pull_ahead_may_be_steady(const struct pull_ahead *a)
{
    return !a->enabled || lag_ns(a) < a->max_lag_ns / 2;
}

void pull_ahead_steady(struct pull_ahead *a)
{
    a->steady_since_ns = a->rooms.host->now_ns;
    a->lag_counts = false;
}

/* ---- getting ahead ------------------------------------------------------- */

static bool congested(const struct pull_ahead *a)
{
    if (!a->enabled || !a->rooms.state->capture.on || !guest_is_taken_up(a->rooms.load))
        return false;
    return a->rooms.tap->waits_since_ns || ring_used(&a->rooms.log->ring) >= a->rooms.tap->pull_ahead_bytes ||
           (a->rooms.state->now == VS_STEADY && a->lag_counts && lag_ns(a) >= a->max_lag_ns);
}

static void back_off(struct pull_ahead *a, bool was_steady)
{
    uint64_t first_ns = a->first_backoff_ns, now = a->rooms.host->now_ns, units;
    if (was_steady && now - a->steady_since_ns >= STEADY_WHILE * first_ns)
        a->times = 0;
    units = a->times == 0 ? 0 : a->times > 6 ? BACKOFF_MAX : 1u << (a->times - 1);
    if (a->times <= 6)
        a->times++;
    a->not_before_ns = now + units * first_ns;
}

static void get_ahead(struct pull_ahead *a)
{
    a->drained = false;
    a->since_ns = a->rooms.host->now_ns;
    a->generation = a->rooms.counts->source_generation;
    a->rooms.tap->ahead_bytes = 0;
    back_off(a, a->rooms.state->now == VS_STEADY);
    mirror_move(a->rooms.state, VS_MIRROR_CONGESTED, VS_REASON_CONGESTION, 0);
    difference_pull_ahead(a->rooms.difference);
}

/* ---- catching up --------------------------------------------------------- */

/* All that was on its way is on the destination, and was flushed. */
static bool is_drained(const struct pull_ahead *a)
{
    return log_drained(a->rooms.log) && a->rooms.replicator->in_use == 0 && a->rooms.uncopied->in_flight == 0 &&
           a->rooms.verifier->in_use == 0 && difference_at_rest(a->rooms.difference);
}

static void tell_drained(struct pull_ahead *a)
{
    uint64_t now = a->rooms.host->now_ns;
    struct vs_event event = {.kind = VS_EV_AHEAD_DRAINED, .value = a->not_before_ns > now ? a->not_before_ns - now : 0};
    a->drained = true;
    mailbox_post(a->rooms.mailbox, &event);
}

int pull_ahead_catch_up(struct pull_ahead *a)
{
    if (a->rooms.state->now != VS_AHEAD)
        return -ENOTCONN;
    if (!a->drained || a->rooms.state->record != RECORD_WRITTEN)
        return -EBUSY;
    if (a->rooms.host->now_ns < a->not_before_ns)
        return -EAGAIN;
    copier_start(a->rooms.copier);
    mirror_move(a->rooms.state, VS_MIRROR_CATCHES_UP, VS_REASON_CATCH_UP, 0);
    return 0;
}

void pull_ahead_pump(struct pull_ahead *a)
{
    if (lag_ns(a) < a->max_lag_ns / 2)
        a->lag_counts = true;
    if (congested(a))
        get_ahead(a);
    if (a->rooms.state->now == VS_AHEAD && !a->drained && is_drained(a))
        tell_drained(a);
}

uint64_t pull_ahead_deadline_ns(const struct pull_ahead *a)
{
    uint64_t oldest_ns = log_oldest_ns(a->rooms.log);
    bool waits = a->enabled && a->rooms.state->now == VS_STEADY && a->lag_counts && guest_is_taken_up(a->rooms.load);
    return waits && oldest_ns ? oldest_ns + a->max_lag_ns : UINT64_MAX;
}

struct lag pull_ahead_lag(const struct pull_ahead *a)
{
    struct lag lag = {a->rooms.log->lag_bytes, log_lag_writes(a->rooms.log), lag_ns(a)};
    if (a->rooms.state->now != VS_AHEAD)
        return lag;
    lag.bytes += a->rooms.tap->ahead_bytes;
    lag.writes += a->rooms.counts->source_generation - a->generation;
    if (lag.ns == 0)
        lag.ns = a->rooms.host->now_ns - a->since_ns;
    return lag;
}
