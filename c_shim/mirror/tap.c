/* SPDX-License-Identifier: Apache-2.0
 *
 * Where the mirror learns of the guest's writes: it counts them, logs those that are mirrored and marks their regions.
 *
 * Invariants:
 *   - A write that is mirrored has its log entry before it is taken.
 *   - It is counted as captured or as uncaptured from when it is taken until the source has completed it. When capture
 *     ends, all that were captured become uncaptured (mirror_state.c).
 *   - source_generation moves here, and so before the guest is shown that the write is complete (durability.md).
 */
#include "tap.h"

#include "bad_ranges.h"
#include "counts.h"
#include "difference.h"
#include "disk.h"
#include "mirror_state.h"

void tap_begin(struct tap *t)
{
    throttle_init(&t->throttle, t->throttle.log_bytes, t->throttle.max_lag_ns);
}

bool tap_captures(const struct tap *t)
{
    return t->state->capture.on;
}

bool tap_tracks(const struct tap *t)
{
    return t->difference->tracked;
}

/* ---- room ------------------------------------------------------------------- */

/* Whether a write has to wait: 0, or for so long, or (UINT64_MAX) until something has changed. */
static uint64_t wait_ns(struct tap *t)
{
    uint64_t used = ring_used(&t->log->ring), oldest_ns = log_oldest_ns(t->log), now = t->host->now_ns;
    uint64_t lag_ns = t->state->now == VS_STEADY && oldest_ns ? now - oldest_ns : 0;
    if (t->pull_ahead_bytes) /* pull_ahead_pump() looks at it */
        return used < t->pull_ahead_bytes ? 0 : UINT64_MAX;
    return throttle_wait_ns(&t->throttle, used, lag_ns, now);
}

static bool take_room(struct tap *t, struct mirrored_write *w, enum log_kind kind, bool may_unmap)
{
    w->entry = log_reserve(t->log, kind, w->offset, w->length);
    if (!w->entry)
        return false;
    w->entry->may_unmap = may_unmap;
    throttle_admitted(&t->throttle, kind == LOG_WRITE ? w->length : 0);
    tap_wait_is_over(t);
    return true;
}

bool tap_reserve(struct tap *t, struct mirrored_write *w, enum log_kind kind, bool may_unmap)
{
    uint64_t wait, now = t->host->now_ns;
    if (!t->state->capture.on)
        return true;
    wait = wait_ns(t);
    if (wait == 0 && take_room(t, w, kind, may_unmap))
        return true;
    if (wait != 0 && wait != UINT64_MAX && (!t->retry_ns || now + wait < t->retry_ns))
        t->retry_ns = now + wait;
    if (!t->waits_since_ns)
        t->waits_since_ns = now;
    return false;
}

void tap_wait_is_over(struct tap *t)
{
    if (t->waits_since_ns)
        t->waited_ns += t->host->now_ns - t->waits_since_ns;
    t->waits_since_ns = 0;
}

void tap_give_back(struct tap *t, struct mirrored_write *w)
{
    if (w->entry)
        log_abandon(t->log, w->entry);
    w->entry = NULL;
}

/* ---- a write on its way ------------------------------------------------------- */

void tap_taken(struct tap *t, struct mirrored_write *w)
{
    struct capture *c = &t->state->capture;
    w->captured = w->entry != NULL;
    w->capture_epoch = c->epoch;
    if (w->captured)
        c->captured++;
    else
        c->uncaptured++;
    /* The bit before the data (rule 4), and before any wait: a resync that begins meanwhile, for which nobody has
     * captured this write, copies what is marked when it begins. */
    difference_mark(t->difference, w->offset, w->length);
}

/* The capture for which it was taken has not ended. */
static bool still_captured(const struct tap *t, const struct mirrored_write *w)
{
    return w->captured && w->capture_epoch == t->state->capture.epoch;
}

static bool leave_source(struct tap *t, const struct mirrored_write *w)
{
    struct capture *c = &t->state->capture;
    bool captured = still_captured(t, w);
    if (captured)
        c->captured--;
    else
        c->uncaptured--;
    return captured;
}

uint64_t tap_completed(struct tap *t, struct mirrored_write *w)
{
    bool captured = leave_source(t, w);
    uint64_t generation = counts_write_completed(t->counts);
    bad_ranges_written(t->bad, w->offset, w->length, generation);
    if (captured)
        log_append(t->log, w->entry, generation, t->host->now_ns);
    else if (w->entry)
        log_abandon(t->log, w->entry);
    if (t->state->now == VS_AHEAD)
        t->ahead_bytes += w->length;
    return generation;
}

void tap_failed(struct tap *t, struct mirrored_write *w)
{
    bool mirrored = leave_source(t, w) && t->state->now == VS_STEADY;
    bad_ranges_write_failed(t->bad, w->offset, w->length, mirrored, t->counts);
    if (w->entry)
        log_abandon(t->log, w->entry);
}
