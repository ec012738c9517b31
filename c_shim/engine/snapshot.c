/* SPDX-License-Identifier: Apache-2.0
 *
 * What the engine shows of itself, put together on its own thread when asked.
 */
#include "snapshot.h"

#include <stddef.h>
#include <string.h>

#include "engine_state.h"
#include "serving.h"

static void fill(const struct vs_engine *e, struct vs_snapshot *s)
{
    struct lag lag = pull_ahead_lag(&e->mirror.ahead);
    memset(s, 0, sizeof *s);
    s->mirror_state = e->mirror.state.now;
    s->gated = e->gate != GATE_OPEN;
    s->record_pending = e->mirror.state.record != RECORD_WRITTEN;
    s->fenced = e->mirror.destination.former
                    ? e->mirror.destination.former->stats.in_flight + !e->mirror.destination.former->stats.in_flight
                    : 0;
    s->write_cache = e->guest.frontends.write_cache;
    s->active_attachment = e->guest.frontends.active
                               ? (uint32_t)(e->guest.frontends.active - e->guest.frontends.attachment)
                               : VS_MAX_ATTACHMENTS;
    s->counts = e->mirror.counts;
    s->lag_bytes = lag.bytes;
    s->lag_writes = lag.writes;
    s->lag_ns = lag.ns;
    s->ahead_drained = e->mirror.state.now == VS_AHEAD && e->mirror.ahead.drained;
    s->log_bytes_used = ring_used(&e->mirror.log.ring);
    s->copy_bytes_total = e->mirror.copier.bytes_total;
    s->copy_bytes_done = e->mirror.copier.bytes_done;
    s->copy_bytes_sparse = e->mirror.copier.bytes_sparse;
    s->bitmap_in_use = e->activity.bitmap != NULL;
    s->bitmap_syncs = e->activity.syncs;
    s->tracked = e->mirror.difference.tracked;
    s->verify_running = e->mirror.verifier.running;
    s->verify_bytes_done = e->mirror.verifier.bytes_done;
    s->verify_bytes_skipped = e->mirror.verifier.bytes_skipped;
    s->verify_bytes_differing = e->mirror.verifier.bytes_differing;
    s->verify_bytes_repaired = e->mirror.verifier.bytes_repaired;
    s->verify_range_count = e->mirror.verifier.differing.count;
    memcpy(s->verify_ranges, e->mirror.verifier.differing.range, sizeof s->verify_ranges);
    s->differing_bytes = e->mirror.difference.tracked ? dirty_map_bytes(&e->mirror.difference.differs) : 0;
    s->throttled_ns =
        e->mirror.tap.waited_ns + (e->mirror.tap.waits_since_ns ? engine_now(e) - e->mirror.tap.waits_since_ns : 0);
    s->polled_ns = e->guest.poller.polled_ns;
    s->polls = e->guest.poller.polls;
    s->poll_hits = e->guest.poller.hits;
    s->wakeups = e->wakeups;
    s->lent = e->host.threads.lent;
    s->syscalls = e->uring.enters + e->guest.frontends.notifications + io_threads_syscalls(&e->host.threads);
    s->requests_waiting = e->mirror.flush.waiting;
    s->doubt_count = e->mirror.bad.doubt.count;
    memcpy(s->doubt, e->mirror.bad.doubt.range, sizeof s->doubt);
    s->spared_count = e->mirror.bad.spared.count;
    memcpy(s->spared, e->mirror.bad.spared.range, sizeof s->spared);
    s->unreadable_count = e->mirror.bad.unreadable.count;
    memcpy(s->unreadable, e->mirror.bad.unreadable.range, sizeof s->unreadable);
    s->reads_from_destination = e->guest.read_fallback.answered;
    s->source_failovers = e->guest.failover.count;
    s->failover_pending = e->guest.failover.pending;
    s->paused = e->mirror.state.pause.on;
    s->pause_held = guest_flush_paused(&e->mirror.flush, NULL);
    s->pause_ns = e->mirror.state.pause.on ? engine_now(e) - e->mirror.state.pause.since_ns : 0;
    s->pause_released = e->mirror.state.pause.released;
    s->disk[VS_SOURCE] = e->mirror.source.disk->stats;
    if (e->mirror.destination.disk)
        s->disk[VS_DESTINATION] = e->mirror.destination.disk->stats;
}

/* Nothing is written where nothing has changed: what is shown of queues that no guest has used stays untouched memory.
 * q: NULL, no frontend's rings run. */
static void show_queue(struct vs_queue_stats *shown, const struct vs_queue_stats *now, const struct queue *q)
{
    const uint32_t in_flight = q ? q->in_flight : 0, running = q ? q->running : 0, broken = q ? q->broken : 0;
    if (memcmp(shown, now, offsetof(struct vs_queue_stats, in_flight)) != 0)
        *shown = *now;
    if (shown->in_flight != in_flight || shown->running != running || shown->broken != broken) {
        shown->in_flight = in_flight;
        shown->running = running;
        shown->broken = broken;
    }
}

void snapshot_take(struct vs_engine *e)
{
    struct mailbox *m = &e->mailbox;
    struct vs_snapshot s;
    fill(e, &s);
    serving_fill(&e->guest, &s);
    pthread_mutex_lock(&m->lock);
    m->snapshot = s;
    m->snapshot.events_lost = m->events_lost;
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++) {
        const struct attachment *active = e->guest.frontends.active;
        show_queue(&m->queue_stats[i], &e->guest.frontends.queue_stats[i], active ? &active->queue[i] : NULL);
    }
    pthread_mutex_unlock(&m->lock);
}
