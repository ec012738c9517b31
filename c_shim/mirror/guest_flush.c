/* SPDX-License-Identifier: Apache-2.0
 *
 * Decides when a flush of the guest is confirmed, and flushes both disks for it.
 *
 * Whoever waits (guest_flush.h says who) is let go when
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

#include "counts.h"
#include "guest_side.h"
#include "mailbox.h"
#include "mirror_state.h"
#include "source.h"

static void source_flushed(struct disk_io *io);
static void destination_flushed(struct destination_io *io, bool current);

void guest_flush_init(struct guest_flush *f, const struct guest_flush_rooms *rooms)
{
    *f = (struct guest_flush){.rooms = *rooms};
    list_init(&f->waiters);
    f->source_io.kind = f->destination_io.io.kind = VS_DISK_FLUSH;
    f->source_io.done = source_flushed;
    f->destination_io.done = destination_flushed;
}

void guest_flush_wait(struct guest_flush *f, struct flush_waiter *w, uint64_t generation)
{
    w->generation = generation;
    w->source_flush = 0;
    w->released = false;
    w->since_ns = f->rooms.host->now_ns;
    list_append(&f->waiters, &w->link);
    f->waiting++;
    if (w->owner) {
        f->guest_waiting++;
        f->rooms.listener->room_freed(f->rooms.listener); /* it counts as at work no more (REQUESTS_MAX) */
    }
    durability_recheck(f->rooms.state);
}

void guest_flush_asked(struct guest_flush *f, struct flush_waiter *w)
{
    guest_flush_wait(f, w, counts_flush_requested(f->rooms.counts));
}

void guest_flush_asked_for(struct guest_flush *f, struct flush_waiter *w, uint64_t generation)
{
    counts_flush_requested(f->rooms.counts);
    guest_flush_wait(f, w, generation);
}

static void let_go(struct guest_flush *f, struct flush_waiter *w, int result)
{
    list_remove(&w->link);
    f->waiting--;
    f->guest_waiting -= w->owner != NULL;
    f->guest_released -= w->released;
    f->answered_ns = f->rooms.host->now_ns;
    w->done(w, result);
}

/* ---- the source -------------------------------------------------------- */

static void flush_source(struct guest_flush *f)
{
    f->source_in_flight = true;
    f->source_number++;
    f->source_generation = f->rooms.counts->source_generation;
    list_each(node, &f->waiters) {
        container_of(node, struct flush_waiter, link)->source_flush = f->source_number;
    }
    disk_submit(f->rooms.source->disk, &f->source_io);
}

static void source_flushed(struct disk_io *io)
{
    struct guest_flush *f = container_of(io, struct guest_flush, source_io);
    f->source_in_flight = false;
    durability_recheck(f->rooms.state);
    if (io->result == 0) {
        counts_source_flushed(f->rooms.counts, f->source_generation);
        return;
    }
    report_io_error(f->rooms.mailbox, VS_SOURCE, io);
    if (!f->rooms.listener->source_flush_failed(f->rooms.listener, io, f->source_number))
        guest_flush_source_failed(f, f->source_number, io->result);
}

void guest_flush_source_failed(struct guest_flush *f, uint64_t number, int error)
{
    /* Theirs is an I/O error, whatever the destination holds; who came later has a flush to come. */
    list_each_safe(node, &f->waiters) {
        struct flush_waiter *w = container_of(node, struct flush_waiter, link);
        if (w->source_flush == number && !w->destination_only && !counts_source_holds(f->rooms.counts, w->generation))
            let_go(f, w, error);
    }
}

/* ---- the destination --------------------------------------------------- */

static void flush_destination(struct guest_flush *f)
{
    f->destination_in_flight = true;
    f->destination_prefix = f->rooms.counts->writes_mirrored; /* at its beginning, not at its end */
    destination_submit(f->rooms.destination, &f->destination_io);
}

static void destination_flushed(struct destination_io *io, bool current)
{
    struct guest_flush *f = container_of(io, struct guest_flush, destination_io);
    f->destination_in_flight = false;
    durability_recheck(f->rooms.state);
    if (current && f->rooms.state->now == VS_STEADY) /* not ahead meanwhile */
        counts_destination_flushed(f->rooms.counts, f->destination_prefix);
}

static bool held_by_pause(const struct guest_flush *f, const struct flush_waiter *w)
{
    return f->rooms.state->pause.on && w->owner && !w->released;
}

static int destination_holds(const struct guest_flush *f, const struct flush_waiter *w)
{
    if (f->rooms.state->joining)
        return w->generation <= f->rooms.state->joining_request ? VS_CHECK_HELD : VS_CHECK_WAIT;
    if (f->rooms.state->now != VS_STEADY)
        return VS_CHECK_HELD;
    return vs_count_check(w->generation, f->rooms.counts->writes_mirrored, f->rooms.counts->writes_flushed);
}

uint64_t guest_flush_since_ns(const struct guest_flush *f, const void *owner)
{
    if (f->rooms.state->now != VS_STEADY && !f->rooms.state->joining)
        return UINT64_MAX;
    list_each(node, &f->waiters) /* in the order in which they came */
    {
        const struct flush_waiter *w = container_of(node, struct flush_waiter, link);
        if ((!owner || w->owner == owner) && destination_holds(f, w) != VS_CHECK_HELD)
            return w->since_ns;
    }
    return UINT64_MAX;
}

/* ---- the pause --------------------------------------------------------- */

unsigned guest_flush_paused(const struct guest_flush *f, const void *owner)
{
    unsigned held = 0;
    if (!f->rooms.state->pause.on)
        return 0;
    if (!owner)
        return f->guest_waiting - f->guest_released;
    list_each(node, &f->waiters) {
        const struct flush_waiter *w = container_of(node, struct flush_waiter, link);
        held += w->owner == owner && held_by_pause(f, w);
    }
    return held;
}

unsigned guest_flush_release(struct guest_flush *f, const void *owner)
{
    unsigned released = 0;
    list_each(node, &f->waiters) {
        struct flush_waiter *w = container_of(node, struct flush_waiter, link);
        if (w->owner != owner || !held_by_pause(f, w))
            continue;
        w->released = true;
        durability_recheck(f->rooms.state);
        f->guest_released++;
        released++;
    }
    return released;
}

/* ---- deciding ---------------------------------------------------------- */

static void decide(struct guest_flush *f, bool *want_source, bool *want_destination)
{
    list_each_safe(node, &f->waiters) {
        struct flush_waiter *w = container_of(node, struct flush_waiter, link);
        int destination = destination_holds(f, w);
        bool source = w->destination_only || counts_source_holds(f->rooms.counts, w->generation);
        if (!source)
            *want_source = true;
        if (destination == VS_CHECK_FLUSH)
            *want_destination = true;
        if (!source || destination != VS_CHECK_HELD || f->rooms.state->record == RECORD_PENDING)
            continue;
        if (held_by_pause(f, w))
            continue;
        let_go(f, w, f->rooms.state->record == RECORD_FAILED ? -EIO : 0);
    }
}

void guest_flush_pump(struct guest_flush *f)
{
    bool want_source = false, want_destination = false;
    if (!f->rooms.state->durability_changed)
        return;
    f->rooms.state->durability_changed = false;
    if (list_empty(&f->waiters))
        return;
    decide(f, &want_source, &want_destination);
    if (want_source && !f->source_in_flight && !(f->rooms.load->holds & GUEST_HOLD_SOURCE_FAILED))
        flush_source(f);
    if (want_destination && !f->destination_in_flight)
        flush_destination(f);
}
