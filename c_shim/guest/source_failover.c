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
#include "engine.h"
#include "request_path.h"

void source_failover_init(struct vs_engine *e)
{
    list_init(&e->failover.parked);
}

/* A switch has to be possible: of what is in doubt the destination knows no better, and one that differs has wrong data
 * where the source has none. */
static bool may_begin(const struct vs_engine *e)
{
    return e->config.switch_on_source_error && e->mirror.state.now == VS_STEADY && !bad_ranges_any(&e->mirror.bad) &&
           !e->mirror.state.differs && bad_ranges_healed(&e->mirror.bad, &e->mirror.counts);
}

static bool begin(struct vs_engine *e, const struct disk_io *io)
{
    struct vs_event event = {.kind = VS_EV_SOURCE_FAILED,
                             .result = io->result,
                             .disk_role = VS_SOURCE,
                             .op = io->kind,
                             .offset = io->kind == VS_DISK_FLUSH ? 0 : io->offset,
                             .length = io->kind == VS_DISK_FLUSH ? 0 : io->length};
    if (!may_begin(e) || !request_path_error_of_disk(io->result))
        return false;
    if (e->failover.pending)
        return true;
    e->failover.pending = true;
    guest_hold(e, GUEST_HOLD_SOURCE_FAILED);
    e->failover.flush_error = 0;
    mailbox_post(&e->mailbox, &event);
    return true;
}

static void park(struct request *r, int error)
{
    r->parked_error = error;
    list_append(&r->engine->failover.parked, &r->link);
}

bool source_failover_park(struct request *r, const struct disk_io *io)
{
    if (!begin(r->engine, io))
        return false;
    park(r, io->result);
    return true;
}

bool source_failover_park_flush(struct vs_engine *e, const struct disk_io *io, uint64_t number)
{
    if (!begin(e, io))
        return false;
    e->failover.flush_error = io->result;
    e->failover.flush_number = number;
    return true;
}

bool source_failover_holds(struct request *r)
{
    if (!r->engine->failover.pending)
        return false;
    park(r, 0);
    return true;
}

static void end(struct vs_engine *e)
{
    e->failover.pending = false;
    durability_recheck(&e->mirror.state);
    guest_release(e, GUEST_HOLD_SOURCE_FAILED);
}

void source_failover_over(struct vs_engine *e)
{
    if (!e->failover.pending)
        return;
    e->failover.count++;
    list_each(node, &e->failover.parked)
    {
        container_of(node, struct request, link)->parked_error = 0;
    }
    end(e);
}

void source_failover_give_up(struct vs_engine *e)
{
    if (!e->failover.pending)
        return;
    end(e);
    if (e->failover.flush_error)
        guest_flush_source_failed(&e->mirror.flush, e->failover.flush_number, e->failover.flush_error);
}

bool source_failover_due(const struct vs_engine *e)
{
    return e->failover.pending && e->mirror.state.now != VS_STEADY && e->gate != GATE_CLOSED;
}

void source_failover_pump(struct vs_engine *e)
{
    struct source_failover *f = &e->failover;
    if (source_failover_due(e))
        source_failover_give_up(e);
    if (f->pending)
        return;
    /* One that needs a buffer on the new disk may have to wait for it. */
    list_each_safe(node, &f->parked)
    {
        struct request *r = container_of(node, struct request, link);
        if (!r->parked_error && !request_path_suits_source(r))
            continue;
        list_remove(node);
        if (r->parked_error)
            request_path_source_failed(r);
        else
            request_path_to_source(r);
    }
}
