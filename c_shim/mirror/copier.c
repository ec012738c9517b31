/* SPDX-License-Identifier: Apache-2.0
 *
 * The bulk copy. Why every byte of the destination ends up as the source's,
 * though no region is read twice while the guest writes:
 *
 * Capture is on, and no uncaptured write is in flight, before the first region
 * is taken. A region copy clears its dirty bits and takes its range slot on the
 * destination *before* its read starts (rule 3). A guest write W of that region
 *   - completed on the source before that: the read sees it. Its entry, if it
 *     was handed to the replicator earlier, holds an earlier slot and is
 *     written first; if it comes to the replicator later, it is written again
 *     after the copy, and so is every later write of those bytes, in order;
 *   - completed later: its entry follows, behind the copy's slot.
 * So the last writer of every byte is the last write in the order, or the copy
 * that has read it. Dirty bits only fall, and the copy ends under any load.
 *
 * A hole is looked for before the slot is taken and verified after, so that a
 * write that filled it meanwhile is either seen or captured. On the destination
 * zeroes are only written where there is no hole already, and that in parts like
 * any other: a disk may have to write them all, and whoever writes there waits.
 * Looking may take as long as a read, so it is a request to the disk like one.
 *
 * What cannot be read (copy_rescue.c finds it out) is not put on the
 * destination, which may hold it better; neither is what is in doubt after a
 * failed write where the destination holds it better (bad_ranges.c, rule 5). It is listed and
 * stays different until the guest writes there; such a write is replicated like
 * any other.
 */
#include "copier.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "attachment.h"
#include "clock.h"
#include "copy_rescue.h"
#include "engine.h"
#include "own_memory.h"

#define BUFFERS_BYTES ((uint64_t)COPY_DEPTH_MAX * COPY_BYTES)

static void read_done(struct disk_io *io);
static void piece_done(struct destination_io *io, bool current);
static void put_next(struct region_copy *c);
static void destination_looked(struct destination_io *io, bool current);
static void displace(struct region_copy *c);
static void pace(struct vs_engine *e, uint64_t bytes);
static void slot_granted(struct range_slot *slot);

int copier_init(struct vs_engine *e)
{
    struct copier *k = &e->copier;
    k->depth = e->config.copy_depth;
    if (k->depth < 1 || k->depth > COPY_DEPTH_MAX)
        return -EINVAL;
    k->buffers = own_memory_map(BUFFERS_BYTES);
    if (!k->buffers)
        return -ENOMEM;
    for (unsigned i = 0; i < COPY_DEPTH_MAX; i++) {
        k->copies[i].engine = e;
        k->copies[i].buffer = k->buffers + (size_t)i * COPY_BYTES;
        k->copies[i].slot.grant = slot_granted;
    }
    for (unsigned i = 0; i < COPY_DISKS; i++)
        copy_scout_init(&k->scouts[i], e);
    return 0;
}

void copier_free(struct vs_engine *e)
{
    own_memory_unmap(e->copier.buffers, BUFFERS_BYTES);
}

static void forget_holes(struct copier *k)
{
    for (unsigned i = 0; i < COPY_DISKS; i++)
        copy_scout_forget(&k->scouts[i]);
}

void copier_start(struct vs_engine *e)
{
    struct copier *k = &e->copier;
    dirty_map_add(&e->to_copy, &e->difference.differs);
    bad_ranges_copy_begins(&e->bad);
    copy_pace_init(&k->pace, k->depth, 1ull << e->to_copy.region_shift, engine_now(e));
    /* The cursor stays where the last copy left off: one that always began with what the guest keeps writing
     * would come no further when it is cut off again and again. */
    k->bytes_total = dirty_map_bytes(&e->to_copy);
    k->bytes_done = k->bytes_sparse = 0;
    k->not_before_ns = 0;
    forget_holes(k);
}

void copier_add(struct vs_engine *e, uint64_t offset, uint64_t length)
{
    struct copier *k = &e->copier;
    dirty_map_set(&e->to_copy, offset, length);
    k->cursor = 0;
    k->bytes_total = length;
    forget_holes(k);
    k->bytes_done = k->bytes_sparse = 0;
}

static bool copying(const struct vs_engine *e)
{
    bool grows = e->mirror.state == VS_STEADY && e->grow.running;
    return e->mirror.state == VS_SYNCING || (grows && !e->failover.pending); /* a source that is left is read no more */
}

bool copier_finished(const struct vs_engine *e)
{
    return e->to_copy.dirty == 0 && e->copier.in_use == 0;
}

bool copier_current(const struct region_copy *c)
{
    return c->epoch == c->engine->destination.epoch;
}

/* Back to the pool; its slot is given back by the caller or by the mirror's end. */
void copier_end(struct region_copy *c)
{
    struct copier *k = &c->engine->copier;
    c->step = COPY_FREE;
    k->in_use--;
    if (k->in_use == 0 && c->engine->to_copy.dirty == 0) /* done: the buffers are not needed for long */
        own_memory_drop(k->buffers, BUFFERS_BYTES);
}

/* The guest goes first: what it asks of a disk waits there behind what the copy has in flight. While it works that
 * is as little as its pace says; never nothing, so that the copy ends. */
static bool yields(const struct vs_engine *e)
{
    unsigned held = guest_flush_paused(e, NULL); /* a pause: they wait for this very copy */
    return e->flush.waiting > held || e->requests_in_flight > held || engine_took_up_lately(e);
}

static uint64_t round_now(const struct region_copy *c)
{
    return yields(c->engine) ? c->engine->copier.pace.round : 0;
}

static void ask_source(struct region_copy *c, void (*done)(struct disk_io *io))
{
    c->pace_round = round_now(c);
    c->io.io.done = done;
    disk_submit(c->engine->source, &c->io.io);
}

static void ask_destination(struct region_copy *c, void (*done)(struct destination_io *io, bool current))
{
    c->pace_round = round_now(c);
    c->io.done = done;
    destination_submit(&c->engine->destination, &c->io);
}

static void succeeded(struct region_copy *c, enum copy_disk disk)
{
    struct vs_engine *e = c->engine;
    copy_pace_completed(&e->copier.pace, disk, c->pace_round, engine_now(e) - c->io.io.submitted_ns, engine_now(e));
}

static void finish_copy(struct region_copy *c)
{
    struct vs_engine *e = c->engine;
    range_release(&e->destination.slots, &c->slot);
    e->copier.bytes_done += c->length;
    e->copier.bytes_sparse += c->sparse;
    copier_end(c);
}

/* ---- putting a region onto the destination ------------------------------ */

static bool is_zero(const uint8_t *p, uint64_t bytes)
{
    return p[0] == 0 && memcmp(p, p + 1, bytes - 1) == 0;
}

static uint64_t unit_at(uint64_t at, uint64_t end)
{
    return end - at < COPY_ZERO_BYTES ? end - at : COPY_ZERO_BYTES;
}

/* The longest piece from "put" to at most "end" that is all zeroes or holds none of them; true: zeroes. */
static bool next_piece(const struct region_copy *c, uint64_t end, uint64_t *piece)
{
    uint64_t at = c->put;
    bool zero;
    if (c->hole) {
        *piece = end - c->put;
        return true;
    }
    zero = is_zero(c->buffer + at, unit_at(at, end));
    do
        at += unit_at(at, end);
    while (at < end && is_zero(c->buffer + at, unit_at(at, end)) == zero);
    *piece = at - c->put;
    return zero;
}

/* Passes over what must not be put; the end of what may be from there on (in the region). */
static uint64_t next_good(struct region_copy *c)
{
    const struct range_set *sets[] = {&c->bad, &c->engine->bad.spared};
    bool passed = true;
    uint64_t end = 0;
    while (passed && c->put < c->length) {
        passed = false;
        end = c->offset + c->length;
        for (unsigned i = 0; i < 2 && !passed; i++) {
            struct vs_range part;
            if (!range_set_first(sets[i], c->offset + c->put, end, &part))
                continue;
            passed = part.offset == c->offset + c->put;
            if (passed)
                c->put += part.length;
            else
                end = part.offset;
        }
    }
    return end - c->offset;
}

/* Of the region, "piece" bytes from "put" on. */
static void submit_piece(struct region_copy *c, uint32_t kind, void (*done)(struct destination_io *io, bool current))
{
    struct disk_io *io = &c->io.io;
    c->iov = (struct iovec){c->buffer + c->put, (size_t)c->piece};
    io->kind = kind;
    io->may_unmap = true;
    io->to_data_end = false;
    io->offset = c->offset + c->put;
    io->length = c->piece;
    io->iov = &c->iov;
    io->iov_count = 1;
    ask_destination(c, done);
}

static void put_next(struct region_copy *c)
{
    uint64_t end = next_good(c);
    if (c->put == c->length)
        finish_copy(c);
    else if (next_piece(c, end, &c->piece))
        submit_piece(c, VS_DISK_EXTENTS, destination_looked);
    else
        submit_piece(c, VS_DISK_WRITE, piece_done);
}

/* Zeroes are to come where it was looked for a hole. */
static void destination_looked(struct destination_io *io, bool current)
{
    struct region_copy *c = container_of(io, struct region_copy, io);
    if (!current) {
        copier_end(c);
    } else if (disk_found_hole(&io->io)) {
        c->sparse += c->piece;
        c->put += c->piece;
        put_next(c);
    } else if (c->piece > COPY_BYTES) { /* it was a hole on both disks just now */
        copy_scout_learn(&c->engine->copier.scouts[COPY_DESTINATION], &io->io);
        displace(c);
    } else {
        if (c->hole)
            pace(c->engine, c->piece);
        c->sparse += c->piece;
        submit_piece(c, VS_DISK_ZERO, piece_done);
    }
}

static void piece_done(struct destination_io *io, bool current)
{
    struct region_copy *c = container_of(io, struct region_copy, io);
    if (!current) {
        copier_end(c);
        return;
    }
    if (io->io.kind == VS_DISK_WRITE)
        succeeded(c, COPY_DESTINATION);
    c->put += c->piece;
    put_next(c);
}

static void slot_granted(struct range_slot *slot)
{
    struct region_copy *c = container_of(slot, struct region_copy, slot);
    if (c->step != COPY_READ || !copier_current(c))
        return;
    /* Not put_next() at once: it may end the copy, and a grant must not give back a slot. */
    c->step = COPY_GRANTED;
    c->engine->copier.granted = true;
}

/* ---- reading ----------------------------------------------------------- */

void copier_was_read(struct region_copy *c)
{
    c->step = c->slot.granted ? COPY_PUTTING : COPY_READ;
    if (c->slot.granted)
        put_next(c);
}

/* In steady, of a range that is no part of the disk yet, and does not become one. */
static void new_range_unreadable(struct region_copy *c)
{
    struct vs_engine *e = c->engine;
    report_io_error(&e->mailbox, VS_SOURCE, &c->io.io);
    range_release(&e->destination.slots, &c->slot);
    copier_end(c);
    grow_stop(e, c->io.io.result);
}

static void read_done(struct disk_io *io)
{
    struct region_copy *c = container_of(io, struct region_copy, io.io);
    if (!copier_current(c)) {
        copier_end(c);
    } else if (io->result < 0 && c->engine->mirror.state == VS_STEADY) {
        new_range_unreadable(c);
    } else if (io->result < 0) {
        rescue_start(c); /* it reports what is lost */
    } else {
        succeeded(c, COPY_SOURCE);
        copier_was_read(c);
    }
}

/* Takes its place in the order; only then may the source be looked at. */
static void place(struct region_copy *c, uint64_t offset, uint64_t length)
{
    struct vs_engine *e = c->engine;
    uint64_t whole = offset >> e->to_copy.region_shift << e->to_copy.region_shift; /* of a region, a part may do */
    c->epoch = e->destination.epoch;
    c->step = COPY_READING;
    c->offset = offset;
    c->length = length;
    c->put = 0;
    c->sparse = 0;
    c->hole = false;
    c->bad.count = 0;
    c->io.io.thread = io_thread_beside(&e->host.threads, (unsigned)(c - e->copier.copies));
    e->copier.in_use++;
    e->copier.cursor = offset + length;
    difference_mark(e, offset, length);
    dirty_map_clear(&e->to_copy, whole, offset + length - whole);
    range_take(&e->destination.slots, &c->slot, offset, length);
}

/* By the speed limit. */
static void pace(struct vs_engine *e, uint64_t bytes)
{
    struct copier *k = &e->copier;
    k->not_before_ns = clock_pace_ns(k->not_before_ns, engine_now(e), bytes, k->speed_bytes_per_s);
}

static void start_reading(struct region_copy *c)
{
    struct disk_io *io = &c->io.io;
    assert(c->length <= COPY_BYTES);
    c->iov = (struct iovec){c->buffer, (size_t)c->length};
    io->kind = VS_DISK_READ;
    io->offset = c->offset;
    io->length = c->length;
    io->iov = &c->iov;
    io->iov_count = 1;
    pace(c->engine, c->length);
    ask_source(c, read_done);
}

/* The first run at or after "from". In steady nothing of what the guest can write to already, and the region across
 * the old end may begin with such (grow.c). */
static bool find_run(const struct vs_engine *e, uint64_t from, uint64_t most, uint64_t *offset, uint64_t *run)
{
    uint64_t first = e->mirror.state == VS_STEADY ? e->config.capacity_bytes : 0;
    if (!dirty_map_find(&e->to_copy, from, most, offset, run))
        return false;
    if (*offset < first) {
        assert(*run > first - *offset);
        *run -= first - *offset;
        *offset = first;
    }
    return true;
}

/* ---- holes ------------------------------------------------------------- */

/* It is as if it had never been placed. */
static void displace(struct region_copy *c)
{
    struct vs_engine *e = c->engine;
    range_release(&e->destination.slots, &c->slot);
    dirty_map_set(&e->to_copy, c->offset, c->length);
    e->copier.cursor = c->offset;
    copier_end(c);
}

/* Whether it still was a hole when it had its place. */
static void hole_looked(struct disk_io *io)
{
    struct region_copy *c = container_of(io, struct region_copy, io.io);
    if (!copier_current(c)) {
        copier_end(c);
    } else if (disk_found_hole(io)) {
        c->hole = true;
        copier_was_read(c);
    } else { /* a write has filled it */
        copy_scout_learn(&c->engine->copier.scouts[COPY_SOURCE], io);
        displace(c);
    }
}

/* How much of the run lies before "end", in whole regions. */
static uint64_t whole_regions(const struct vs_engine *e, uint64_t offset, uint64_t run, uint64_t end)
{
    if (end >= offset + run)
        return run;
    end = end >> e->to_copy.region_shift << e->to_copy.region_shift;
    return end > offset ? end - offset : 0;
}

/* Where the run begins with a hole of the source: if the destination has one too there is nothing to do, and it is passed
 * over in large steps; else zeroes are put there, in parts like any other. */
static bool start_hole(struct region_copy *c, uint64_t offset, uint64_t run)
{
    struct vs_engine *e = c->engine;
    const struct copy_scout *source = &e->copier.scouts[COPY_SOURCE], *there = &e->copier.scouts[COPY_DESTINATION];
    uint64_t length = 0, large;
    if (!source->hole)
        return false;
    if (there->hole && find_run(e, offset, COPY_HOLE_BYTES, &offset, &large))
        length = whole_regions(e, offset, large, source->end < there->end ? source->end : there->end);
    if (length == 0)
        length = whole_regions(e, offset, run, source->end);
    if (length == 0)
        return false;
    place(c, offset, length);
    c->step = COPY_LOOKING;
    c->io.io.kind = VS_DISK_EXTENTS;
    c->io.io.to_data_end = false;
    c->io.io.offset = offset;
    c->io.io.length = length;
    ask_source(c, hole_looked);
    return true;
}

/* What the source has at offset, and where that is a hole the destination too; else they are asked. */
static bool is_known(struct vs_engine *e, uint64_t offset)
{
    struct copy_scout *scouts = e->copier.scouts;
    return copy_scout_knows(&scouts[COPY_SOURCE], e->source, offset) &&
           (!scouts[COPY_SOURCE].hole || copy_scout_knows(&scouts[COPY_DESTINATION], e->destination.disk, offset));
}

/* ---- what is begun ------------------------------------------------------- */

static unsigned reads_in_flight(const struct copier *k)
{
    unsigned count = 0;
    for (unsigned i = 0; i < COPY_DEPTH_MAX; i++)
        count += k->copies[i].step == COPY_READING;
    return count;
}

static bool may_begin(const struct vs_engine *e)
{
    const struct copier *k = &e->copier;
    if (pull_ahead_log_fills(e))
        return false; /* replication goes first, or the guest would get ahead */
    if (k->not_before_ns > engine_now(e)) /* by the speed limit */
        return false;
    if (yields(e))
        return k->in_use < copy_pace_parts(&k->pace) && reads_in_flight(k) < copy_pace_reads(&k->pace);
    return k->in_use < k->depth;
}

/* What is to be copied next: from the cursor to the disk's end, then from its beginning. */
static bool next_run(const struct vs_engine *e, uint64_t *offset, uint64_t *run)
{
    uint64_t most = yields(e) ? copy_pace_part_bytes(&e->copier.pace) : COPY_BYTES;
    return find_run(e, e->copier.cursor, most, offset, run) || find_run(e, 0, most, offset, run);
}

static struct region_copy *free_copy(struct copier *k)
{
    for (unsigned i = 0; i < COPY_DEPTH_MAX; i++)
        if (k->copies[i].step == COPY_FREE)
            return &k->copies[i];
    return NULL;
}

static void put_granted(struct copier *k)
{
    k->granted = false;
    for (unsigned i = 0; i < COPY_DEPTH_MAX; i++) {
        struct region_copy *c = &k->copies[i];
        if (c->step != COPY_GRANTED)
            continue;
        c->step = COPY_PUTTING;
        put_next(c);
    }
}

void copier_pump(struct vs_engine *e)
{
    struct copier *k = &e->copier;
    uint64_t offset, run;
    if (k->granted)
        put_granted(k);
    if (!copying(e) || e->mirror.uncaptured_writes)
        return;
    while (may_begin(e) && next_run(e, &offset, &run) && is_known(e, offset)) {
        struct region_copy *c = free_copy(k);
        if (start_hole(c, offset, run))
            continue;
        place(c, offset, run);
        start_reading(c);
    }
}

uint64_t copier_deadline_ns(const struct vs_engine *e)
{
    bool waits = copying(e) && e->to_copy.dirty && e->copier.not_before_ns > engine_now(e);
    return waits ? e->copier.not_before_ns : UINT64_MAX;
}

void copier_mark_in_flight(struct vs_engine *e)
{
    for (unsigned i = 0; i < COPY_DEPTH_MAX; i++) {
        const struct region_copy *c = &e->copier.copies[i];
        if (c->step != COPY_FREE && copier_current(c))
            difference_mark(e, c->offset, c->length);
    }
}

void copier_drop(struct vs_engine *e)
{
    for (unsigned i = 0; i < COPY_DEPTH_MAX; i++)
        if (e->copier.copies[i].step == COPY_READ || e->copier.copies[i].step == COPY_GRANTED)
            copier_end(&e->copier.copies[i]);
    dirty_map_clear_all(&e->to_copy);
}
