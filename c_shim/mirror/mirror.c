/* SPDX-License-Identifier: Apache-2.0 */
#include "mirror.h"

#include <assert.h>
#include <errno.h>

#include "attachment.h"
#include "engine.h"

static void steady_flushed(struct disk_io *io);

void mirror_init(struct vs_engine *e)
{
    struct mirror *m = &e->mirror;
    m->epoch = m->capture_epoch = 1;
    range_slots_init(&m->slots);
    m->steady_flush.kind = VS_DISK_FLUSH;
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
    if (mirror_attached(m) || m->former || e->gate != GATE_OPEN || m->record != RECORD_WRITTEN)
        return -EBUSY;
    if (disk->bytes < e->config.capacity_bytes)
        return -ENOSPC;
    if (disk->block_bytes > e->config.block_bytes || (resync && !e->difference.tracked))
        return -EINVAL;
    disk_adopt(disk, &e->host);
    m->disk = disk;
    m->capturing = true;
    range_slots_init(&m->slots);
    throttle_init(&e->throttle, e->config.log_bytes, e->config.max_lag_us * 1000);
    difference_attach(e, resync);
    pull_ahead_reset(e);
    if (!(flags & VS_START_SPARE_DOUBT))
        spared_forget(e);
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

static void former_closed(struct disk_io *closing)
{
    struct vs_engine *e = container_of(closing->disk->host, struct vs_engine, host);
    struct vs_event event = {.kind = VS_EV_FENCE_CLEAR};
    disk_free(e->mirror.former);
    e->mirror.former = NULL;
    mailbox_post(&e->mailbox, &event);
}

/* Closing may wait for the disk, so it is no work for this thread; the fence holds until it is over, too. */
static void close_former(struct vs_engine *e)
{
    struct mirror *m = &e->mirror;
    if (!m->former || m->former->stats.in_flight || e->replicator.in_use || e->copier.in_use)
        return;
    disk_close_later(m->former, former_closed);
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
    spared_leave_steady(e);
    counts_leave_steady(&e->counts);
    list_splice(&e->ready, &e->stalled);
    e->throttle_until_ns = 0;
    engine_stop_throttling(e);
}

/* Whatever is captured for it, queued for it or in flight to it belongs to a
 * former mirror from here on. */
static void give_up(struct vs_engine *e)
{
    struct mirror *m = &e->mirror;
    m->epoch++;
    m->former = m->disk;
    m->disk = NULL;
    m->steady_flush_in_flight = false;
    mirror_stop_capture(e);
    replicator_drop(e);
    copier_drop(e);
    difference_detach(e);
    range_slots_init(&m->slots); /* nobody gives back a slot of a former epoch */
}

void mirror_degrade(struct vs_engine *e, uint32_t reason, int error)
{
    struct mirror *m = &e->mirror;
    bool was_steady = m->state == VS_STEADY;
    if (!mirror_attached(m))
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
    if (mirror_attached(&e->mirror))
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
    m->steady_epoch = m->epoch;
    m->steady_capture_epoch = m->capture_epoch;
    m->steady_prefix = prefix;
    disk_submit(m->disk, &m->steady_flush);
}

static void steady_flushed(struct disk_io *io)
{
    struct vs_engine *e = container_of(io, struct vs_engine, mirror.steady_flush);
    struct mirror *m = &e->mirror;
    if (io->result < 0)
        engine_report_io_error(e, VS_DESTINATION, io);
    if (m->steady_epoch != m->epoch)
        return;
    m->steady_flush_in_flight = false;
    if (io->result < 0) {
        mirror_degrade(e, VS_REASON_DESTINATION_FLUSH, io->result);
        return;
    }
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
    spared_pump(e);
    if (list_empty(&e->stalled) || !engine_takes_up(e))
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
    if (!mirror_attached(&e->mirror))
        return UINT64_MAX;
    oldest = disk_oldest_ns(e->mirror.disk);
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
    return (e->doubt.count || e->unreadable.count) && (flags & ~VS_EXCHANGE_DIFFERENT) != VS_EXCHANGE_ACCEPT;
}

int mirror_exchange(struct vs_engine *e, uint32_t flags)
{
    struct mirror *m = &e->mirror;
    bool keep = flags & VS_EXCHANGE_KEEP;
    vs_disk *old = e->source;
    if (m->state != VS_STEADY)
        return -ENOTCONN;
    if (e->gate != GATE_CLOSED || ranges_forbid(e, flags) || (keep && !e->counts.source_flush_known))
        return -EBUSY;
    if (m->differs && !(flags & VS_EXCHANGE_DIFFERENT))
        return -EBADE;
    if (e->source->stats.in_flight || m->disk->stats.in_flight)
        return -EBUSY; /* somebody has asked for a flush behind the gate */
    assert((e->requests_in_flight == 0 || e->failover.pending) && log_drained(&e->log));
    counts_exchange(&e->counts, keep);
    e->source = m->disk;
    e->flush.dirty = true;
    if (keep) {
        m->disk = old;
        mirror_post(e, VS_EV_STATE, VS_REASON_SWITCH, 0);
        return 0;
    }
    e->doubt.count = e->unreadable.count = 0; /* they spoke of the old source */
    spared_forget(e);
    m->disk = NULL;
    m->capturing = false;
    m->epoch++;
    m->capture_epoch++;
    m->uncaptured_writes += m->captured_writes; /* of those that are parked */
    m->captured_writes = 0;
    difference_forget(e);
    m->left_sources++;
    disk_close_later(old, left_source_closed);
    mirror_set_state(e, VS_PASSTHROUGH, VS_REASON_SWITCH, 0);
    return 0;
}
