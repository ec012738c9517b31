/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine's part of a switch (docs/write-path.md, "A switch").
 *
 *   drain      the guest runs: the destination (or both disks) is flushed, so that little is left for the pause
 *   gate       nothing is taken up any more; closed when all that was taken up is over and the log is empty (M = G),
 *              or opened again when that takes longer than allowed, or another drain is needed
 *   exchange   the roles change; the gate opens: the guest goes on on the other disk. Or (VS_EXCHANGE_HOLD) it stays
 *              closed, until all disks of a group are exchanged, or this one is exchanged back
 *
 * Invariants:
 *   - between a gate that has closed and its opening no request is in flight, so whatever is exchanged meanwhile, no
 *     request sees half of it;
 *   - the mark, in memory that outlives the process (state_file.py), is stored with the exchange: before the first
 *     request goes to the new disk, and never without it.
 */
#include "switching.h"

#include <errno.h>
#include <stdlib.h>

#include "clock.h"
#include "engine_state.h"
#include "source_failover.h"

/* ---- drain ---------------------------------------------------------------- */

struct drain {
    struct flush_waiter waiter;
    struct vs_engine *engine;
    uint64_t token;
    uint64_t epoch;
};

static void drain_done(struct flush_waiter *w, int result)
{
    struct drain *d = container_of(w, struct drain, waiter);
    if (result == 0 && d->epoch != d->engine->mirror.state.capture.epoch)
        result = -ENOTCONN; /* the source alone holds it: the mirror was lost, or is ahead meanwhile */
    mailbox_done(&d->engine->mailbox, d->token, result, 0);
    free(d);
}

void drain_begin(struct vs_engine *e, uint64_t token, bool both_disks)
{
    struct drain *d = e->mirror.state.now == VS_STEADY ? calloc(1, sizeof *d) : NULL;
    if (!d) {
        mailbox_done(&e->mailbox, token, e->mirror.state.now == VS_STEADY ? -ENOMEM : -ENOTCONN, 0);
        return;
    }
    d->engine = e;
    d->token = token;
    d->epoch = e->mirror.state.capture.epoch;
    d->waiter.done = drain_done;
    d->waiter.destination_only = !both_disks;
    guest_flush_wait(&e->mirror.flush, &d->waiter, e->mirror.counts.source_generation);
}

void drains_free(struct vs_engine *e)
{
    if (!e->mirror.flush.waiters.next)
        return;
    list_each_safe(node, &e->mirror.flush.waiters) {
        struct flush_waiter *w = container_of(node, struct flush_waiter, link);
        if (w->done == drain_done)
            free(container_of(w, struct drain, waiter));
    }
}

/* ---- the gate ------------------------------------------------------------ */

void gate_close(struct vs_engine *e, uint64_t token, uint64_t allowed_us)
{
    if (e->gate != GATE_OPEN || e->mirror.state.now != VS_STEADY) {
        mailbox_done(&e->mailbox, token, e->gate != GATE_OPEN ? -EBUSY : -ENOTCONN, 0);
        return;
    }
    e->gate = GATE_CLOSING;
    guest_hold(&e->guest, GUEST_HOLD_SWITCH);
    e->gate_token = token;
    e->gate_closed_ns = clock_world_ns(); /* the guest's pause is what it is, also while this process is stopped */
    e->gate_deadline_ns = clock_ns() + allowed_us * 1000;
}

static void gate_open(struct vs_engine *e)
{
    e->gate = GATE_OPEN;
    guest_release(&e->guest, GUEST_HOLD_SWITCH);
}

static void exchange_now(struct vs_engine *e, uint64_t token, const struct vs_exchange *x)
{
    int rc = mirror_exchange(&e->mirror, x->flags, e->gate == GATE_CLOSED);
    uint64_t pause_ns = clock_world_ns() - e->gate_closed_ns;
    if (rc == 0) {
        if (x->mark)
            __atomic_store_n(x->mark, x->mark_value, __ATOMIC_RELEASE);
        e->host.changes++; /* what the file says of one disk is said of the other from here on */
        source_failover_over(&e->guest);
        if (!(x->flags & VS_EXCHANGE_HOLD))
            gate_open(e);
    }
    mailbox_done(&e->mailbox, token, rc, pause_ns);
}

/* It was submitted while the gate closed; rc: how that has ended. */
static void exchange_waited(struct vs_engine *e, int rc)
{
    struct waiting_exchange x = e->exchange;
    e->exchange.token = 0;
    if (x.token && rc == 0)
        exchange_now(e, x.token, &x.what);
    else if (x.token)
        mailbox_done(&e->mailbox, x.token, -ECANCELED, 0);
}

static bool drained(const struct vs_engine *e)
{
    /* What is parked, or waits for something that is, has nothing in flight (source_failover.c). */
    return (e->guest.load.in_flight == 0 || e->guest.failover.pending) && log_drained(&e->mirror.log) &&
           e->mirror.replicator.in_use == 0 && e->mirror.source.disk->stats.in_flight == 0 &&
           e->mirror.destination.disk->stats.in_flight == 0;
}

void gate_pump(struct vs_engine *e)
{
    int rc;
    if (e->gate != GATE_CLOSING)
        return;
    if (e->mirror.state.now != VS_STEADY)
        rc = -ENOTCONN;
    else if (drained(e))
        rc = bad_ranges_healed(&e->mirror.bad, &e->mirror.counts) ? 0 : -EAGAIN;
    else if (engine_now(e) >= e->gate_deadline_ns)
        rc = -ETIMEDOUT;
    else
        return;
    if (rc == 0)
        e->gate = GATE_CLOSED;
    else
        gate_open(e);
    mailbox_done(&e->mailbox, e->gate_token, rc, clock_world_ns() - e->gate_closed_ns);
    exchange_waited(e, rc);
}

uint64_t gate_cancel(struct vs_engine *e)
{
    if (e->gate == GATE_CLOSING)
        mailbox_done(&e->mailbox, e->gate_token, -ECANCELED, 0);
    exchange_waited(e, -ECANCELED);
    if (e->gate == GATE_OPEN)
        return 0;
    gate_open(e);
    return clock_world_ns() - e->gate_closed_ns;
}

void switch_exchange(struct vs_engine *e, uint64_t token, const struct vs_exchange *what)
{
    if (e->gate == GATE_CLOSING && !e->exchange.token)
        e->exchange = (struct waiting_exchange){token, *what};
    else
        exchange_now(e, token, what);
}
