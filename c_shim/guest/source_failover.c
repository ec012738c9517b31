/* SPDX-License-Identifier: Apache-2.0
 *
 * When a read, a write or a flush of the source fails in steady, it is parked
 * instead of answered, and the control plane is told. From then on
 *
 *   - no request is taken up, and nothing more goes to the source: a request
 *     that comes to it is parked too (also one that has waited for a turn or
 *     for an extent meanwhile), and so is one that fails there;
 *   - what the source has completed is replicated, until M = G.
 *
 * So the gate of a switch drains all but what is parked, and that has nothing
 * in flight. A parked write stays as it is: its capture, its range slot, its
 * place in captured_writes; it has no place in the log's order, and its range
 * is not in doubt, because the guest was told nothing. After the exchange each
 * parked request goes to the new disk by the way on which it would have gone
 * to the old one: so counts, slots and answers are those of any request.
 * Flushes that waited are decided anew: the new source has to be flushed.
 *
 * If the mirror is lost, or the control plane gives up, each is answered as
 * without all this (rule 5).
 *
 * For errors, not for hangs: a source that does not answer keeps its requests,
 * since nobody knows whether they will still be written.
 */
#include "source_failover.h"

#include <errno.h>

#include "attachment.h"
#include "guest.h"
#include "request.h"

void source_failover_init(struct guest *g)
{
    list_init(&g->failover.parked);
}

/* A switch has to be possible: of what is in doubt the destination knows no better, and one that differs has wrong data
 * where the source has none. */
static bool may_begin(const struct guest *g)
{
    return g->config->switch_on_source_error && g->mirror->state.now == VS_STEADY && !bad_ranges_any(&g->mirror->bad) &&
           !g->mirror->state.differs && bad_ranges_healed(&g->mirror->bad, &g->mirror->counts);
}

static bool begin_failover(struct guest *g, const struct disk_io *io)
{
    struct vs_event event = {.kind = VS_EV_SOURCE_FAILED,
                             .result = io->result,
                             .disk_role = VS_SOURCE,
                             .op = io->kind,
                             .offset = io->kind == VS_DISK_FLUSH ? 0 : io->offset,
                             .length = io->kind == VS_DISK_FLUSH ? 0 : io->length};
    if (!may_begin(g) || !error_is_of_disk(io->result))
        return false;
    if (g->failover.pending)
        return true;
    g->failover.pending = true;
    guest_hold(g, GUEST_HOLD_SOURCE_FAILED);
    g->failover.flush_error = 0;
    mailbox_post(g->mailbox, &event);
    return true;
}

static void park(struct request *r, int error)
{
    r->parked_error = error;
    list_append(&r->guest->failover.parked, &r->link);
}

bool source_failover_park(struct request *r, const struct disk_io *io)
{
    if (!begin_failover(r->guest, io))
        return false;
    park(r, io->result);
    return true;
}

bool source_failover_park_flush(struct guest *g, const struct disk_io *io, uint64_t number)
{
    if (!begin_failover(g, io))
        return false;
    g->failover.flush_error = io->result;
    g->failover.flush_number = number;
    return true;
}

bool source_failover_holds(struct request *r)
{
    if (!r->guest->failover.pending)
        return false;
    park(r, 0);
    return true;
}

static void end_failover(struct guest *g)
{
    g->failover.pending = false;
    durability_recheck(&g->mirror->state);
    guest_release(g, GUEST_HOLD_SOURCE_FAILED);
}

void source_failover_over(struct guest *g)
{
    if (!g->failover.pending)
        return;
    g->failover.count++;
    list_each(node, &g->failover.parked) {
        container_of(node, struct request, link)->parked_error = 0;
    }
    end_failover(g);
}

void source_failover_give_up(struct guest *g)
{
    if (!g->failover.pending)
        return;
    end_failover(g);
    if (g->failover.flush_error)
        guest_flush_source_failed(&g->mirror->flush, g->failover.flush_number, g->failover.flush_error);
}

bool source_failover_due(const struct guest *g, bool gate_closed)
{
    return g->failover.pending && g->mirror->state.now != VS_STEADY && !gate_closed;
}

void source_failover_pump(struct guest *g, bool gate_closed)
{
    if (source_failover_due(g, gate_closed))
        source_failover_give_up(g);
}
