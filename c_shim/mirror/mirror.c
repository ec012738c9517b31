/* SPDX-License-Identifier: Apache-2.0 */
#include "mirror.h"

#include <assert.h>
#include <errno.h>

#include "attachment.h"
#include "engine.h"

static void steady_flushed(struct destination_io *io, bool current);

static void destination_lost(struct destination *d, uint32_t reason, int error)
{
    mirror_degrade(container_of(d, struct vs_engine, destination), reason, error);
}

void mirror_init(struct vs_engine *e)
{
    struct mirror *m = &e->mirror;
    destination_init(&e->destination, &e->mailbox, destination_lost);
    m->capture_epoch = 1;
    m->steady_flush.io.kind = VS_DISK_FLUSH;
    m->steady_flush.done = steady_flushed;
}

void mirror_post(struct vs_engine *e, uint32_t kind, uint32_t reason, int error)
{
    struct vs_event event = {.kind = kind, .value = e->mirror.state, .reason = reason, .result = error};
    mailbox_post(&e->mailbox, &event);
}

void mirror_set_state(struct vs_engine *e, enum vs_mirror_state state, uint32_t reason, int error)
{
    e->mirror.state = state;
    e->flush.dirty = true; /* waiting flushes are decided anew */
    mirror_post(e, VS_EV_STATE, reason, error);
}

int mirror_start(struct vs_engine *e, vs_disk *disk, uint32_t flags)
{
    struct mirror *m = &e->mirror;
    bool resync = flags & VS_START_RESYNC;
    if (destination_attached(&e->destination) || e->destination.former || e->gate != GATE_OPEN || m->record != RECORD_WRITTEN)
        return -EBUSY;
    if (disk->bytes < e->config.capacity_bytes)
        return -ENOSPC;
    if (disk->block_bytes > e->config.block_bytes || (resync && !e->difference.tracked))
        return -EINVAL;
    destination_attach(&e->destination, disk, &e->host);
    m->capturing = true;
    throttle_init(&e->throttle, e->config.log_bytes, e->config.max_lag_us * 1000);
    difference_attach(e, resync);
    pull_ahead_reset(e);
    if (!(flags & VS_START_SPARE_DOUBT))
        bad_ranges_spare_none(&e->bad);
    copier_start(e);
    mirror_set_state(e, VS_SYNCING, VS_REASON_COMMAND, 0);
    return 0;
}

/* ---- the pause (on_destination_error=pause) ------------------------------ */

static void set_paused(struct vs_engine *e, bool paused)
{
    struct vs_event event = {.kind = VS_EV_PAUSED, .value = paused};
    if (e->mirror.paused == paused)
        return;
    e->mirror.paused = paused;
    e->mirror.paused_since_ns = engine_now(e);
    e->flush.dirty = true;
    mailbox_post(&e->mailbox, &event);
}

/* ---- the end of a destination ------------------------------------------ */

static void close_former(struct vs_engine *e)
{
    const vs_disk *former = e->destination.former;
    if (former && !former->stats.in_flight && !e->replicator.in_use && !e->copier.in_use)
        destination_close_former(&e->destination);
}

static void left_source_closed(struct disk_io *closing)
{
    struct vs_engine *e = container_of(closing->disk->host, struct vs_engine, host);
    disk_free(closing->disk);
    e->mirror.left_sources--;
}

void mirror_stop_capture(struct vs_engine *e)
{
    struct mirror *m = &e->mirror;
    m->capture_epoch++;
    m->capturing = false;
    m->uncaptured_writes += m->captured_writes;
    m->captured_writes = 0;
    m->joining = false;
    bad_ranges_leave_steady(&e->bad, &e->counts);
    counts_leave_steady(&e->counts);
    queues_retry(&e->frontends);
    e->throttle_until_ns = 0;
    engine_stop_throttling(e);
}

/* Whatever is captured for it, queued for it or in flight to it belongs to a
 * former mirror from here on. */
static void give_up(struct vs_engine *e)
{
    struct mirror *m = &e->mirror;
    destination_give_up(&e->destination);
    m->steady_flush_in_flight = false;
    mirror_stop_capture(e);
    replicator_drop(e);
    copier_drop(e);
    difference_detach(e);
}

void mirror_degrade(struct vs_engine *e, uint32_t reason, int error)
{
    struct mirror *m = &e->mirror;
    bool was_steady = m->state == VS_STEADY;
    if (!destination_attached(&e->destination))
        return;
    give_up(e);
    if (was_steady) {
        m->record = RECORD_PENDING;
        set_paused(e, e->config.pause_on_destination_error);
    }
    mirror_set_state(e, VS_DEGRADED, reason, error);
    if (was_steady)
        mirror_post(e, VS_EV_DEGRADED, reason, error);
}

void mirror_stop(struct vs_engine *e, uint32_t reason)
{
    if (destination_attached(&e->destination))
        give_up(e);
    set_paused(e, false);
    if (e->mirror.state != VS_PASSTHROUGH)
        mirror_set_state(e, VS_PASSTHROUGH, reason, 0);
}

/* ---- steady ------------------------------------------------------------ */

/* All regions are copied: what is on the destination now has to be durable there. And it has to be all that a guest
 * was told is durable, though only the source was asked: once what was confirmed so far is mirrored too. */
static void begin_steady(struct vs_engine *e)
{
    struct mirror *m = &e->mirror;
    uint64_t prefix = log_mirrored_prefix(&e->log, e->counts.source_generation);
    if (!m->joining) {
        m->joining = true;
        m->joining_request = e->counts.flush_request;
    }
    if (prefix < m->joining_request)
        return;
    m->steady_flush_in_flight = true;
    m->steady_capture_epoch = m->capture_epoch;
    m->steady_prefix = prefix;
    destination_submit(&e->destination, &m->steady_flush);
}

static void steady_flushed(struct destination_io *io, bool current)
{
    struct vs_engine *e = container_of(io, struct vs_engine, mirror.steady_flush);
    struct mirror *m = &e->mirror;
    if (!current)
        return;
    m->steady_flush_in_flight = false;
    if (m->steady_capture_epoch != m->capture_epoch)
        return; /* ahead of it meanwhile */
    m->joining = false;
    set_paused(e, false); /* whoever was held by it has asked before this flush began, and is decided by the counts */
    counts_enter_steady(&e->counts, m->steady_prefix);
    /* Writes that were mirrored while it was flushed. */
    counts_mirrored(&e->counts, log_mirrored_prefix(&e->log, e->counts.source_generation));
    pull_ahead_steady(e);
    difference_hurry(e); /* what was copied has only the source's flush to wait for */
    mirror_set_state(e, VS_STEADY, VS_REASON_COPY_DONE, 0);
}

void mirror_pump(struct vs_engine *e)
{
    struct mirror *m = &e->mirror;
    close_former(e);
    bad_ranges_pump(&e->bad, &e->counts);
    if (list_empty(&e->frontends.stalled) || !engine_takes_up(e))
        engine_stop_throttling(e); /* who waited for room does not any more: stopped, gone, or held by a switch */
    if (mirror_deadline_ns(e) <= engine_now(e))
        mirror_degrade(e, VS_REASON_DESTINATION_TIMEOUT, -ETIMEDOUT);
    if (m->state == VS_SYNCING && !m->steady_flush_in_flight && !m->uncaptured_writes && copier_finished(e) &&
        (m->joining || pull_ahead_may_be_steady(e)))
        begin_steady(e);
}

uint64_t mirror_deadline_ns(const struct vs_engine *e)
{
    uint64_t oldest;
    if (!destination_attached(&e->destination))
        return UINT64_MAX;
    oldest = disk_oldest_ns(e->destination.disk);
    /* A destination that answers, but too slowly: neither a flush nor a blocked write waits longer (rule 7). */
    if (e->throttled_since_ns && e->throttled_since_ns < oldest)
        oldest = e->throttled_since_ns;
    if (guest_flush_since_ns(e, NULL) < oldest)
        oldest = guest_flush_since_ns(e, NULL);
    return oldest == UINT64_MAX ? oldest : oldest + e->config.destination_timeout_us * 1000;
}

/* ---- the exchange ------------------------------------------------------ */

/* A disk that is left behind with such ranges is no mirror of the other: they may differ there for ever. */
static bool ranges_forbid(const struct vs_engine *e, uint32_t flags)
{
    return bad_ranges_any(&e->bad) && (flags & ~VS_EXCHANGE_DIFFERENT) != VS_EXCHANGE_ACCEPT;
}

int mirror_exchange(struct vs_engine *e, uint32_t flags)
{
    struct mirror *m = &e->mirror;
    bool keep = flags & VS_EXCHANGE_KEEP;
    vs_disk *old = e->source, *new = e->destination.disk;
    if (m->state != VS_STEADY)
        return -ENOTCONN;
    if (e->gate != GATE_CLOSED || ranges_forbid(e, flags) || (keep && !e->counts.source_flush_known))
        return -EBUSY;
    if (m->differs && !(flags & VS_EXCHANGE_DIFFERENT))
        return -EBADE;
    if (e->source->stats.in_flight || new->stats.in_flight)
        return -EBUSY; /* somebody has asked for a flush behind the gate */
    assert((e->requests_in_flight == 0 || e->failover.pending) && log_drained(&e->log));
    counts_exchange(&e->counts, keep);
    e->source = destination_exchange(&e->destination, keep ? old : NULL);
    e->flush.dirty = true;
    if (keep) {
        mirror_post(e, VS_EV_STATE, VS_REASON_SWITCH, 0);
        return 0;
    }
    bad_ranges_forget(&e->bad); /* they spoke of the old source */
    m->capturing = false;
    m->capture_epoch++;
    m->uncaptured_writes += m->captured_writes; /* of those that are parked */
    m->captured_writes = 0;
    difference_forget(e);
    m->left_sources++;
    disk_close_later(old, left_source_closed);
    mirror_set_state(e, VS_PASSTHROUGH, VS_REASON_SWITCH, 0);
    return 0;
}
