/* SPDX-License-Identifier: Apache-2.0
 *
 * What the engine shows of itself, put together on its own thread when asked.
 */
#include "snapshot.h"

#include <string.h>

static void fill(const struct vs_engine *e, struct vs_snapshot *s)
{
    struct lag lag = pull_ahead_lag(e);
    memset(s, 0, sizeof *s);
    s->mirror_state = e->mirror.state;
    s->gated = e->gate != GATE_OPEN;
    s->record_pending = e->mirror.record != RECORD_WRITTEN;
    s->fenced = e->destination.former ? e->destination.former->stats.in_flight + !e->destination.former->stats.in_flight : 0;
    s->write_cache = e->frontends.write_cache;
    s->active_attachment = e->frontends.active ? (uint32_t)(e->frontends.active - e->frontends.attachment) : VS_MAX_ATTACHMENTS;
    s->counts = e->counts;
    s->lag_bytes = lag.bytes;
    s->lag_writes = lag.writes;
    s->lag_ns = lag.ns;
    s->ahead_drained = e->mirror.state == VS_AHEAD && e->ahead.drained;
    s->log_bytes_used = ring_used(&e->log.ring);
    s->copy_bytes_total = e->copier.bytes_total;
    s->copy_bytes_done = e->copier.bytes_done;
    s->copy_bytes_sparse = e->copier.bytes_sparse;
    s->bitmap_in_use = e->activity.bitmap != NULL;
    s->bitmap_syncs = e->activity.syncs;
    s->tracked = e->difference.tracked;
    s->verify_running = e->verifier.running;
    s->verify_bytes_done = e->verifier.bytes_done;
    s->verify_bytes_skipped = e->verifier.bytes_skipped;
    s->verify_bytes_differing = e->verifier.bytes_differing;
    s->verify_bytes_repaired = e->verifier.bytes_repaired;
    s->verify_range_count = e->verifier.differing.count;
    memcpy(s->verify_ranges, e->verifier.differing.range, sizeof s->verify_ranges);
    s->differing_bytes = e->difference.tracked ? dirty_map_bytes(&e->difference.differs) : 0;
    s->throttled_ns = e->throttled_ns + (e->throttled_since_ns ? engine_now(e) - e->throttled_since_ns : 0);
    s->polled_ns = e->poller.polled_ns;
    s->polls = e->poller.polls;
    s->poll_hits = e->poller.hits;
    s->wakeups = e->wakeups;
    s->lent = e->host.threads.lent;
    s->syscalls = e->uring.enters + e->frontends.notifications + io_threads_syscalls(&e->host.threads);
    s->requests_waiting = e->flush.waiting;
    s->doubt_count = e->bad.doubt.count;
    memcpy(s->doubt, e->bad.doubt.range, sizeof s->doubt);
    s->spared_count = e->bad.spared.count;
    memcpy(s->spared, e->bad.spared.range, sizeof s->spared);
    s->unreadable_count = e->bad.unreadable.count;
    memcpy(s->unreadable, e->bad.unreadable.range, sizeof s->unreadable);
    s->reads_from_destination = e->read_fallback.answered;
    s->source_failovers = e->failover.count;
    s->failover_pending = e->failover.pending;
    s->paused = e->mirror.paused;
    s->pause_held = guest_flush_paused(e, NULL);
    s->pause_ns = e->mirror.paused ? engine_now(e) - e->mirror.paused_since_ns : 0;
    s->pause_released = e->mirror.pause_released;
    s->disk[VS_SOURCE] = e->source->stats;
    if (e->destination.disk)
        s->disk[VS_DESTINATION] = e->destination.disk->stats;
}

void snapshot_take(struct vs_engine *e)
{
    struct mailbox *m = &e->mailbox;
    struct vs_snapshot s;
    fill(e, &s);
    pthread_mutex_lock(&m->lock);
    m->snapshot = s;
    m->snapshot.events_lost = m->events_lost;
    memcpy(m->queue_stats, e->frontends.queue_stats, sizeof m->queue_stats);
    for (unsigned i = 0; e->frontends.active && i < VS_MAX_QUEUES; i++) {
        const struct queue *q = &e->frontends.active->queue[i];
        m->queue_stats[i].in_flight = q->in_flight;
        m->queue_stats[i].running = q->running;
        m->queue_stats[i].broken = q->broken;
    }
    pthread_mutex_unlock(&m->lock);
}
