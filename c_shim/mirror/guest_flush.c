/* SPDX-License-Identifier: Apache-2.0
 *
 * A waiter is let go when
 *   - the source holds its generation durably (a source flush that began when G
 *     was at least it has succeeded), and
 *   - in steady, the count check says that the destination does too (and while
 *     steady begins, nobody is let go who would have to ask it then), and
 *   - the state record is not pending: what is confirmed without the
 *     destination must first be known not to depend on it (durability.md,
 *     section 5), and
 *   - no pause holds it: with on_destination_error=pause, a steady destination
 *     was lost, and none has become steady since. The control plane's own are
 *     not held: they are told that there is no mirror.
 * Source and destination are flushed side by side. At most one flush of each is
 * in flight; it serves everybody whose generation it covers.
 */
#include "guest_flush.h"

#include <errno.h>

#include "attachment.h"
#include "engine.h"

static void source_flushed(struct disk_io *io);
static void destination_flushed(struct destination_io *io, bool current);

void guest_flush_init(struct vs_engine *e)
{
    list_init(&e->flush.waiters);
    e->flush.source_io.kind = e->flush.destination_io.io.kind = VS_DISK_FLUSH;
    e->flush.source_io.done = source_flushed;
    e->flush.destination_io.done = destination_flushed;
}

void guest_flush_wait(struct vs_engine *e, struct flush_waiter *w, uint64_t generation)
{
    w->generation = generation;
    w->source_flush = 0;
    w->released = false;
    w->since_ns = engine_now(e);
    list_append(&e->flush.waiters, &w->link);
    e->flush.waiting++;
    if (w->owner) {
        e->flush.guest_waiting++;
        e->room = true; /* it counts as at work no more (REQUESTS_MAX) */
    }
    e->flush.dirty = true;
}

static void let_go(struct vs_engine *e, struct flush_waiter *w, int result)
{
    list_remove(&w->link);
    e->flush.waiting--;
    e->flush.guest_waiting -= w->owner != NULL;
    e->flush.guest_released -= w->released;
    e->flush.answered_ns = engine_now(e);
    w->done(w, result);
}

/* ---- the source -------------------------------------------------------- */

static void flush_source(struct vs_engine *e)
{
    struct guest_flush *f = &e->flush;
    f->source_in_flight = true;
    f->source_number++;
    f->source_generation = e->counts.source_generation;
    list_each(node, &f->waiters)
    {
        container_of(node, struct flush_waiter, link)->source_flush = f->source_number;
    }
    disk_submit(e->source, &f->source_io);
}

static void source_flushed(struct disk_io *io)
{
    struct vs_engine *e = container_of(io, struct vs_engine, flush.source_io);
    struct guest_flush *f = &e->flush;
    f->source_in_flight = false;
    f->dirty = true;
    if (io->result == 0) {
        counts_source_flushed(&e->counts, f->source_generation);
        return;
    }
    report_io_error(&e->mailbox, VS_SOURCE, io);
    if (!source_failover_park_flush(e, io, f->source_number))
        guest_flush_source_failed(e, f->source_number, io->result);
}

void guest_flush_source_failed(struct vs_engine *e, uint64_t number, int error)
{
    struct guest_flush *f = &e->flush;
    /* Theirs is an I/O error, whatever the destination holds; who came later has a flush to come. */
    list_each_safe(node, &f->waiters)
    {
        struct flush_waiter *w = container_of(node, struct flush_waiter, link);
        if (w->source_flush == number && !w->destination_only && !counts_source_holds(&e->counts, w->generation))
            let_go(e, w, error);
    }
}

/* ---- the destination --------------------------------------------------- */

static void flush_destination(struct vs_engine *e)
{
    struct guest_flush *f = &e->flush;
    f->destination_in_flight = true;
    f->destination_prefix = e->counts.writes_mirrored; /* at its beginning, not at its end */
    destination_submit(&e->destination, &f->destination_io);
}

static void destination_flushed(struct destination_io *io, bool current)
{
    struct vs_engine *e = container_of(io, struct vs_engine, flush.destination_io);
    struct guest_flush *f = &e->flush;
    f->destination_in_flight = false;
    f->dirty = true;
    if (current && e->mirror.state == VS_STEADY) /* not ahead meanwhile */
        counts_destination_flushed(&e->counts, f->destination_prefix);
}

static bool held_by_pause(const struct vs_engine *e, const struct flush_waiter *w)
{
    return e->mirror.paused && w->owner && !w->released;
}

static int check(const struct vs_engine *e, const struct flush_waiter *w)
{
    if (e->mirror.joining)
        return w->generation <= e->mirror.joining_request ? VS_CHECK_HELD : VS_CHECK_WAIT;
    if (e->mirror.state != VS_STEADY)
        return VS_CHECK_HELD;
    return vs_count_check(w->generation, e->counts.writes_mirrored, e->counts.writes_flushed);
}

uint64_t guest_flush_since_ns(const struct vs_engine *e, const void *owner)
{
    if (e->mirror.state != VS_STEADY && !e->mirror.joining)
        return UINT64_MAX;
    list_each(node, &e->flush.waiters) /* in the order in which they came */
    {
        const struct flush_waiter *w = container_of(node, struct flush_waiter, link);
        if ((!owner || w->owner == owner) && check(e, w) != VS_CHECK_HELD)
            return w->since_ns;
    }
    return UINT64_MAX;
}

/* ---- the pause --------------------------------------------------------- */

unsigned guest_flush_paused(const struct vs_engine *e, const void *owner)
{
    unsigned held = 0;
    if (!e->mirror.paused)
        return 0;
    if (!owner)
        return e->flush.guest_waiting - e->flush.guest_released;
    list_each(node, &e->flush.waiters)
    {
        const struct flush_waiter *w = container_of(node, struct flush_waiter, link);
        held += w->owner == owner && held_by_pause(e, w);
    }
    return held;
}

unsigned guest_flush_release(struct vs_engine *e, const void *owner)
{
    unsigned released = 0;
    list_each(node, &e->flush.waiters)
    {
        struct flush_waiter *w = container_of(node, struct flush_waiter, link);
        if (w->owner != owner || !held_by_pause(e, w))
            continue;
        w->released = e->flush.dirty = true;
        e->flush.guest_released++;
        released++;
    }
    return released;
}

/* ---- deciding ---------------------------------------------------------- */

static void decide(struct vs_engine *e, bool *want_source, bool *want_destination)
{
    struct guest_flush *f = &e->flush;
    list_each_safe(node, &f->waiters)
    {
        struct flush_waiter *w = container_of(node, struct flush_waiter, link);
        int destination = check(e, w);
        bool source = w->destination_only || counts_source_holds(&e->counts, w->generation);
        if (!source)
            *want_source = true;
        if (destination == VS_CHECK_FLUSH)
            *want_destination = true;
        if (!source || destination != VS_CHECK_HELD || e->mirror.record == RECORD_PENDING)
            continue;
        if (held_by_pause(e, w))
            continue;
        let_go(e, w, e->mirror.record == RECORD_FAILED ? -EIO : 0);
    }
}

void guest_flush_pump(struct vs_engine *e)
{
    struct guest_flush *f = &e->flush;
    bool want_source = false, want_destination = false;
    if (!f->dirty)
        return;
    f->dirty = false;
    if (list_empty(&f->waiters))
        return;
    decide(e, &want_source, &want_destination);
    if (want_source && !f->source_in_flight && !e->failover.pending)
        flush_source(e);
    if (want_destination && !f->destination_in_flight)
        flush_destination(e);
}
