/* SPDX-License-Identifier: Apache-2.0
 *
 * Takes entries from the log and writes them to the destination, in an order that keeps the last write of each byte
 * last. See replicator.h.
 */
#include "replicator.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "counts.h"
#include "destination.h"
#include "guest_side.h"
#include "mirror_state.h"
#include "repl_log.h"
#include "throttle.h"
#include "uncopied.h"

int replicator_init(struct replicator *r, const struct replicator_rooms *rooms)
{
    *r = (struct replicator){.rooms = *rooms};
    list_init(&r->free);
    list_init(&r->used);
    r->replicas = calloc(REPLICA_DEPTH, sizeof *r->replicas);
    if (!r->replicas)
        return -ENOMEM;
    for (unsigned i = REPLICA_DEPTH; i-- > 0;) {
        r->replicas[i].replicator = r;
        list_push(&r->free, &r->replicas[i].link);
    }
    return 0;
}

void replicator_free(struct replicator *r)
{
    free(r->replicas);
}

static struct log_entry *entry_at(struct repl_log *log, uint64_t place)
{
    return log->order[place % log->ring.slot_count];
}

static void release(struct replica *p)
{
    struct replicator *r = p->replicator;
    uint64_t bytes = 0;
    for (unsigned i = 0; i < p->count; i++) {
        struct log_entry *entry = entry_at(r->rooms.log, p->first + i);
        bytes += entry->kind == LOG_WRITE ? entry->length : 0;
        log_mirrored(r->rooms.log, entry);
    }
    r->rooms.listener->room_freed(r->rooms.listener);
    throttle_drained(r->rooms.throttle, bytes, r->rooms.host->now_ns);
    list_remove(&p->link);
    list_push(&r->free, &p->link);
    r->in_use--;
}

/* A destination that has failed it is given up by now: no count may pass its entries. */
static void replica_done(struct destination_io *io, bool current)
{
    struct replica *p = container_of(io, struct replica, io);
    struct replicator *r = p->replicator;
    if (current)
        range_release(&r->rooms.destination->slots, &p->slot);
    release(p); /* of a former destination too: the buffers were its until now */
    if (!current)
        return;
    if (r->rooms.state->now == VS_STEADY)
        counts_mirrored(r->rooms.counts, log_mirrored_prefix(r->rooms.log, r->rooms.counts->source_generation));
    durability_recheck(r->rooms.state);
}

static void submit(struct range_slot *slot)
{
    struct replica *p = container_of(slot, struct replica, slot);
    p->submitted = true;
    p->io.io.thread = io_thread_beside(&p->replicator->rooms.host->threads, (unsigned)(p - p->replicator->replicas));
    destination_submit(p->replicator->rooms.destination, &p->io);
}

/* In the log's memory: where the last one ends, the next one begins. */
static bool adjoins(const struct replica *p, const struct log_entry *next)
{
    const struct iovec *last = &p->iov[p->io.io.iov_count - 1];
    return (const uint8_t *)last->iov_base + last->iov_len == next->data;
}

static bool continues(const struct replica *p, const struct log_entry *next)
{
    const vs_disk *disk = p->replicator->rooms.destination->disk;
    return next && next->kind == LOG_WRITE && p->io.io.kind == VS_DISK_WRITE && p->count < REPLICA_IOV_MAX &&
           next->offset == p->io.io.offset + p->io.io.length && p->io.io.length + next->length <= REPLICA_MERGE_BYTES &&
           (!(disk->can & DISK_ONE_BUFFER) || adjoins(p, next));
}

static void add(struct replica *p, struct repl_log *log, const struct log_entry *entry)
{
    if (entry->kind == LOG_WRITE && p->count > 0 && adjoins(p, entry))
        p->iov[p->io.io.iov_count - 1].iov_len += (size_t)entry->length;
    else if (entry->kind == LOG_WRITE)
        p->iov[p->io.io.iov_count++] = (struct iovec){entry->data, (size_t)entry->length};
    p->io.io.length += entry->length;
    p->count++;
    log_take(log);
}

/* In syncing, a write to a region that the copy has not begun is not replicated:
 * the copy will read it from the source, which has completed it already. If the
 * copy was cut off (ahead), the region is still known to differ. Where something
 * is promised of the destination, every write is: in steady, though the disk
 * grows (grow.c), and in ahead, if steady came before it. */
static bool left_to_the_copy(const struct replicator *r, const struct log_entry *entry)
{
    enum vs_mirror_state state = r->rooms.state->now;
    bool worth_nothing = state == VS_SYNCING || (state == VS_AHEAD && !r->rooms.state->consistent);
    return worth_nothing && r->rooms.uncopied->regions.dirty &&
           dirty_map_all_dirty(&r->rooms.uncopied->regions, entry->offset, entry->length);
}

void replicator_pump(struct replicator *r)
{
    struct repl_log *log = r->rooms.log;
    struct log_entry *entry;
    if (!destination_attached(r->rooms.destination))
        return;
    while ((entry = log_peek(log))) {
        struct replica *p;
        if (left_to_the_copy(r, entry)) {
            log_take(log);
            log_mirrored(log, entry);
            r->rooms.listener->room_freed(r->rooms.listener);
            continue;
        }
        if (list_empty(&r->free))
            break;
        p = container_of(list_pop(&r->free), struct replica, link);
        list_append(&r->used, &p->link);
        r->in_use++;
        p->submitted = false;
        p->first = log->order_next;
        p->count = 0;
        p->slot.grant = submit;
        p->io.io.kind = entry->kind == LOG_WRITE ? VS_DISK_WRITE : VS_DISK_ZERO;
        p->io.io.may_unmap = entry->may_unmap;
        p->io.io.offset = entry->offset;
        p->io.io.length = 0;
        p->io.io.iov = p->iov;
        p->io.io.iov_count = 0;
        p->io.done = replica_done;
        add(p, log, entry);
        while (continues(p, entry = log_peek(log)) && !left_to_the_copy(r, entry))
            add(p, log, entry);
        if (range_take(&r->rooms.destination->slots, &p->slot, p->io.io.offset, p->io.io.length))
            submit(&p->slot);
    }
}

void replicator_drop(struct replicator *r)
{
    list_each_safe(node, &r->used) {
        struct replica *p = container_of(node, struct replica, link);
        if (!p->submitted)
            release(p); /* the range slots are reset as a whole by the mirror */
    }
    log_drop_untaken(r->rooms.log);
}
