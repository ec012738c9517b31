/* SPDX-License-Identifier: Apache-2.0 */
#include "replicator.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "attachment.h"
#include "engine.h"

int replicator_init(struct vs_engine *e)
{
    struct replicator *p = &e->replicator;
    list_init(&p->free);
    list_init(&p->used);
    p->replicas = calloc(REPLICA_DEPTH, sizeof *p->replicas);
    if (!p->replicas)
        return -ENOMEM;
    for (unsigned i = REPLICA_DEPTH; i-- > 0;) {
        p->replicas[i].engine = e;
        list_push(&p->free, &p->replicas[i].link);
    }
    return 0;
}

void replicator_free(struct vs_engine *e)
{
    free(e->replicator.replicas);
}

static struct log_entry *entry_at(struct repl_log *log, uint64_t place)
{
    return log->order[place % log->ring.slot_count];
}

static void release(struct replica *p)
{
    struct vs_engine *e = p->engine;
    uint64_t bytes = 0;
    for (unsigned i = 0; i < p->count; i++) {
        struct log_entry *entry = entry_at(&e->log, p->first + i);
        bytes += entry->kind == LOG_WRITE ? entry->length : 0;
        log_mirrored(&e->log, entry);
    }
    e->room = true;
    throttle_drained(&e->throttle, bytes, engine_now(e));
    list_remove(&p->link);
    list_push(&e->replicator.free, &p->link);
    e->replicator.in_use--;
}

/* A destination that has failed it is given up by now: no count may pass its entries. */
static void replica_done(struct destination_io *io, bool current)
{
    struct replica *p = container_of(io, struct replica, io);
    struct vs_engine *e = p->engine;
    if (current)
        range_release(&e->destination.slots, &p->slot);
    release(p); /* of a former destination too: the buffers were its until now */
    if (!current)
        return;
    if (e->mirror.state == VS_STEADY)
        counts_mirrored(&e->counts, log_mirrored_prefix(&e->log, e->counts.source_generation));
    e->flush.dirty = true;
}

static void submit(struct range_slot *slot)
{
    struct replica *p = container_of(slot, struct replica, slot);
    p->submitted = true;
    p->io.io.thread = io_thread_beside(&p->engine->host.threads, (unsigned)(p - p->engine->replicator.replicas));
    destination_submit(&p->engine->destination, &p->io);
}

static bool continues(const struct replica *p, const struct log_entry *next)
{
    return next && next->kind == LOG_WRITE && p->io.io.kind == VS_DISK_WRITE && p->count < REPLICA_IOV_MAX &&
           next->offset == p->io.io.offset + p->io.io.length && p->io.io.length + next->length <= REPLICA_MERGE_BYTES;
}

static void add(struct replica *p, struct repl_log *log, const struct log_entry *entry)
{
    if (entry->kind == LOG_WRITE)
        p->iov[p->count] = (struct iovec){entry->data, (size_t)entry->length};
    p->io.io.length += entry->length;
    p->count++;
    log_take(log);
}

/* In syncing, a write to a region that the copy has not begun is not replicated:
 * the copy will read it from the source, which has completed it already. If the
 * copy was cut off (ahead), the region is still known to differ. Where something
 * is promised of the destination, every write is: in steady, though the disk
 * grows (grow.c), and in ahead, if steady came before it. */
static bool left_to_the_copy(const struct vs_engine *e, const struct log_entry *entry)
{
    enum vs_mirror_state state = e->mirror.state;
    bool worth_nothing = state == VS_SYNCING || (state == VS_AHEAD && !e->ahead.consistent);
    return worth_nothing && e->to_copy.dirty && dirty_map_all_dirty(&e->to_copy, entry->offset, entry->length);
}

void replicator_pump(struct vs_engine *e)
{
    struct repl_log *log = &e->log;
    struct log_entry *entry;
    if (!destination_attached(&e->destination))
        return;
    while ((entry = log_peek(log))) {
        struct replica *p;
        if (left_to_the_copy(e, entry)) {
            log_take(log);
            log_mirrored(log, entry);
            e->room = true;
            continue;
        }
        if (list_empty(&e->replicator.free))
            break;
        p = container_of(list_pop(&e->replicator.free), struct replica, link);
        list_append(&e->replicator.used, &p->link);
        e->replicator.in_use++;
        p->submitted = false;
        p->first = log->order_next;
        p->count = 0;
        p->slot.grant = submit;
        p->io.io.kind = entry->kind == LOG_WRITE ? VS_DISK_WRITE : VS_DISK_ZERO;
        p->io.io.may_unmap = entry->may_unmap;
        p->io.io.offset = entry->offset;
        p->io.io.length = 0;
        p->io.done = replica_done;
        add(p, log, entry);
        while (continues(p, entry = log_peek(log)) && !left_to_the_copy(e, entry))
            add(p, log, entry);
        p->io.io.iov = p->iov;
        p->io.io.iov_count = (int)p->count;
        if (range_take(&e->destination.slots, &p->slot, p->io.io.offset, p->io.io.length))
            submit(&p->slot);
    }
}

void replicator_drop(struct vs_engine *e)
{
    list_each_safe(node, &e->replicator.used)
    {
        struct replica *p = container_of(node, struct replica, link);
        if (!p->submitted)
            release(p); /* the range slots are reset as a whole by the mirror */
    }
    log_drop_untaken(&e->log);
}
