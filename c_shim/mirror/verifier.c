/* SPDX-License-Identifier: Apache-2.0
 *
 * Online verification: are both disks equal, as `steady` promises?
 *
 * Under load the two disks are never equal at one instant, so equality is asked
 * for part by part:
 *   1. A glance: both are read as they are. Equal (the rule): done, and the
 *      guest has noticed nothing.
 *   2. They differ: perhaps a write was on its way. The part's range slot on the
 *      source is taken, so that the guest's writes there wait for their turn;
 *      those in flight end first. G is sampled, M >= G awaited: now the
 *      destination has every write of that range, and nothing changes it. Both
 *      are read again. What differs now is a mismatch, block by block.
 *   3. With repair: the bit, the destination's slot, and the source's bytes are
 *      written there (rules 3 and 4), flushed, and read back. What follows from the guest comes after it
 *      in the order. The next checkpoint clears the bit.
 *      The flush is its own: no count tells a switch, which may be the next thing, that one is needed.
 *
 * Nobody waits for the verifier longer than for the disks: a destination that
 * does not answer is given up by its timeout like any other time, and with it
 * the verification. While a switch has closed the gate, or the source is being
 * left because it fails, no new part is begun; after a switch that keeps the
 * mirror it goes on, with the roles changed.
 *
 * Left out (counted as skipped): ranges in doubt or unreadable, parts that the
 * source cannot read. A part that the destination cannot read is a mismatch.
 */
#include "verifier.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "bad_ranges.h"
#include "clock.h"
#include "guest_side.h"
#include "mailbox.h"
#include "mirror_state.h"
#include "own_memory.h"
#include "source.h"

#define BUFFERS_BYTES ((uint64_t)VERIFY_DEPTH * 2 * VERIFY_BYTES)

static void source_read(struct disk_io *io);
static void destination_read(struct destination_io *io, bool current);
static void repaired(struct destination_io *io, bool current);
static void repair_flushed(struct destination_io *io, bool current);
static void read_back(struct destination_io *io, bool current);
static void granted(struct range_slot *slot);
static void scouted(struct disk_io *io);
static void mark_in_flight(struct marker *m);

int verifier_init(struct verifier *v, const struct verifier_rooms *rooms)
{
    *v = (struct verifier){.rooms = *rooms, .marker.mark_in_flight = mark_in_flight};
    difference_add_marker(rooms->difference, &v->marker);
    v->buffers = own_memory_map(BUFFERS_BYTES);
    if (!v->buffers)
        return -ENOMEM;
    for (unsigned i = 0; i < VERIFY_DEPTH; i++) {
        struct compare *c = &v->compares[i];
        c->verifier = v;
        c->source_slot.grant = granted;
        c->destination_slot.grant = granted;
        c->source_data = v->buffers + (size_t)(2 * i) * VERIFY_BYTES;
        c->destination_data = c->source_data + VERIFY_BYTES;
    }
    v->scout.kind = VS_DISK_EXTENTS;
    v->scout.to_data_end = true;
    v->scout.done = scouted;
    return 0;
}

void verifier_free(struct verifier *v)
{
    own_memory_unmap(v->buffers, BUFFERS_BYTES);
}

int verifier_start(struct verifier *v, bool repair, uint64_t speed_bytes_per_s)
{
    if (v->running || v->scouting)
        return -EBUSY;
    if (v->rooms.state->now != VS_STEADY)
        return -ENOTCONN;
    v->running = true;
    v->repair = repair;
    v->result = 0;
    v->cursor = v->known_end = 0;
    v->bytes_done = v->bytes_skipped = v->bytes_differing = v->bytes_repaired = 0;
    v->differing.count = 0;
    v->speed_bytes_per_s = speed_bytes_per_s;
    v->not_before_ns = 0;
    return 0;
}

int verifier_stop(struct verifier *v)
{
    if (!v->running)
        return -ENOENT;
    v->result = -ECANCELED;
    return 0;
}

static bool is_current(const struct compare *c)
{
    return c->epoch == c->verifier->rooms.destination->epoch;
}

static void end_compare(struct compare *c)
{
    struct verifier *v = c->verifier;
    assert(c->reads == 0);
    if (c->holds_source)
        range_release(&v->rooms.source->slots, &c->source_slot);
    if (c->holds_destination && is_current(c)) /* a former mirror's slots were given back as a whole */
        range_release(&v->rooms.destination->slots, &c->destination_slot);
    c->holds_source = c->holds_destination = false;
    c->step = COMPARE_FREE;
    v->in_use--;
}

static void finish_compare(struct compare *c)
{
    c->verifier->bytes_done += c->length;
    end_compare(c);
}

/* ---- reading ----------------------------------------------------------------- */

static void prepare(struct compare *c, struct disk_io *io, struct iovec *iov, uint8_t *data)
{
    *iov = (struct iovec){data, (size_t)c->length};
    io->kind = VS_DISK_READ;
    io->offset = c->offset;
    io->length = c->length;
    io->iov = iov;
    io->iov_count = 1;
}

static void read_both(struct compare *c, enum compare_step step)
{
    struct verifier *v = c->verifier;
    c->step = step;
    c->reads = 2;
    c->source_failed = c->destination_failed = false;
    c->source_io.thread = io_thread_beside(&v->rooms.host->threads, 0);
    c->destination_io.io.thread = io_thread_beside(&v->rooms.host->threads, 1);
    prepare(c, &c->source_io, &c->source_iov, c->source_data);
    prepare(c, &c->destination_io.io, &c->destination_iov, c->destination_data);
    c->source_io.done = source_read;
    c->destination_io.done = destination_read;
    disk_submit(v->rooms.source->disk, &c->source_io);
    destination_submit(v->rooms.destination, &c->destination_io);
}

static void take_turn(struct compare *c)
{
    struct verifier *v = c->verifier;
    c->step = COMPARE_TURN;
    c->holds_source = true;
    range_take(&v->rooms.source->slots, &c->source_slot, c->offset, c->length);
}

/* The slot says by itself that it was granted; verifier_pump() looks at it. */
static void granted(struct range_slot *slot)
{
    (void)slot;
}

static bool block_differs(const struct compare *c, uint64_t at, uint64_t bytes)
{
    return c->destination_failed || memcmp(c->source_data + at, c->destination_data + at, bytes) != 0;
}

/* Lists what differs, as exact as a block; returns how many bytes that is. */
static uint64_t list_differences(struct compare *c)
{
    struct verifier *v = c->verifier;
    uint64_t block = v->rooms.source->block_bytes, found = 0;
    for (uint64_t at = 0; at < c->length; at += block) {
        if (!block_differs(c, at, block))
            continue;
        range_set_add(&v->differing, c->offset + at, block);
        found += block;
    }
    v->bytes_differing += found;
    if (found)
        v->rooms.state->differs = true;
    return found;
}

static void repair(struct compare *c)
{
    struct verifier *v = c->verifier;
    bool free;
    c->step = COMPARE_REPAIR;
    difference_mark(v->rooms.difference, c->offset, c->length);
    free = range_take(&v->rooms.destination->slots, &c->destination_slot, c->offset, c->length);
    assert(free); /* all writes of that range are on the destination, and no new one can come */
    c->holds_destination = true;
    prepare(c, &c->destination_io.io, &c->destination_iov, c->source_data);
    c->destination_io.io.kind = VS_DISK_WRITE;
    c->destination_io.done = repaired;
    destination_submit(v->rooms.destination, &c->destination_io);
}

static void repaired(struct destination_io *io, bool current)
{
    struct compare *c = container_of(io, struct compare, destination_io);
    if (!current) {
        end_compare(c);
        return;
    }
    io->io.kind = VS_DISK_FLUSH;
    io->done = repair_flushed;
    destination_submit(c->verifier->rooms.destination, io);
}

static void repair_flushed(struct destination_io *io, bool current)
{
    struct compare *c = container_of(io, struct compare, destination_io);
    if (!current) {
        end_compare(c);
        return;
    }
    c->step = COMPARE_AGAIN;
    prepare(c, &io->io, &c->destination_iov, c->destination_data);
    io->done = read_back;
    destination_submit(c->verifier->rooms.destination, io);
}

static void read_back(struct destination_io *io, bool current)
{
    struct compare *c = container_of(io, struct compare, destination_io);
    if (!current) {
        end_compare(c);
        return;
    }
    if (io->io.result == 0 && memcmp(c->source_data, c->destination_data, c->length) == 0)
        c->verifier->bytes_repaired += c->found;
    finish_compare(c);
}

static void compare_exactly(struct compare *c)
{
    struct verifier *v = c->verifier;
    /* The write that it has waited for has failed (rule 5). */
    if (bad_ranges_overlap(v->rooms.bad, c->offset, c->length)) {
        v->bytes_skipped += c->length;
        finish_compare(c);
        return;
    }
    c->found = list_differences(c);
    if (c->found > 0 && v->repair)
        repair(c);
    else
        finish_compare(c);
}

static void both_read(struct compare *c)
{
    struct verifier *v = c->verifier;
    if (!is_current(c) || c->verifier->rooms.state->now != VS_STEADY) {
        end_compare(c);
    } else if (c->source_failed) {
        v->bytes_skipped += c->length;
        finish_compare(c);
    } else if (!c->destination_failed && memcmp(c->source_data, c->destination_data, c->length) == 0) {
        finish_compare(c);
    } else if (c->step == COMPARE_READ) {
        compare_exactly(c);
    } else {
        take_turn(c);
    }
}

static void one_read(struct compare *c)
{
    if (--c->reads == 0)
        both_read(c);
}

static void source_read(struct disk_io *io)
{
    struct compare *c = container_of(io, struct compare, source_io);
    if (io->result < 0)
        report_io_error(c->verifier->rooms.mailbox, VS_SOURCE, io);
    c->source_failed = io->result < 0;
    one_read(c);
}

static void destination_read(struct destination_io *io, bool current)
{
    struct compare *c = container_of(io, struct compare, destination_io);
    (void)current; /* both_read() asks, when the source has answered too */
    c->destination_failed = io->io.result < 0;
    one_read(c);
}

/* ---- going on ------------------------------------------------------------------ */

/* What waits for nothing that calls it. */
static void step_on(struct compare *c)
{
    struct verifier *v = c->verifier;
    if (c->step != COMPARE_TURN && c->step != COMPARE_MIRRORED)
        return;
    if (!is_current(c) || v->rooms.state->now != VS_STEADY) {
        end_compare(c);
        return;
    }
    if (c->step == COMPARE_TURN && c->source_slot.granted) {
        c->step = COMPARE_MIRRORED;
        c->generation = v->rooms.counts->source_generation;
    }
    if (c->step == COMPARE_MIRRORED && v->rooms.counts->writes_mirrored >= c->generation)
        read_both(c, COMPARE_READ);
}

/* Up to this, from the cursor on: holes of both disks, which are equal, or data of one of them. */
static void know(struct verifier *v, uint64_t end, bool holes)
{
    v->known_end = end;
    v->known_holes = holes;
}

/* First the source is asked, then the destination, whether there is data from the cursor on. */
static void scout(struct verifier *v, struct vs_disk *disk, uint64_t end)
{
    v->scouting = true;
    v->scout_epoch = v->rooms.destination->epoch;
    v->scout.offset = v->cursor;
    v->scout.length = end - v->cursor;
    v->scout_disk = disk;
    disk_submit(disk, &v->scout);
}

/* A hole may end anywhere: a disk's blocks may be smaller than the guest's, and a server may say what it likes. The
 * other disk is asked in whole blocks. */
static void scouted(struct disk_io *io)
{
    struct verifier *v = container_of(io, struct verifier, scout);
    uint64_t block = v->rooms.source->block_bytes, holes_end;
    v->scouting = false;
    if (!v->running || v->scout_epoch != v->rooms.destination->epoch || v->rooms.state->now != VS_STEADY)
        return;
    holes_end = io->data_at / block * block;
    if (holes_end == io->offset)
        know(v, io->data_end, false);
    else if (v->scout_disk == v->rooms.source->disk)
        scout(v, v->rooms.destination->disk, holes_end);
    else
        know(v, holes_end, true);
}

static void begin_compare(struct verifier *v, struct compare *c)
{
    uint64_t left = v->rooms.source->capacity_bytes - v->cursor;
    c->epoch = v->rooms.destination->epoch;
    c->offset = v->cursor;
    c->length = left < VERIFY_BYTES ? left : VERIFY_BYTES;
    v->cursor += c->length;
    if (bad_ranges_overlap(v->rooms.bad, c->offset, c->length)) {
        v->bytes_skipped += c->length;
        v->bytes_done += c->length;
        return;
    }
    v->in_use++;
    v->not_before_ns = clock_pace_ns(v->not_before_ns, v->rooms.host->now_ns, c->length, v->speed_bytes_per_s);
    read_both(c, COMPARE_GLANCE);
}

/* Passes over what both disks have as holes; whether it is known that there is something to compare at the cursor. */
static bool pass_holes(struct verifier *v)
{
    if (v->cursor >= v->known_end) {
        scout(v, v->rooms.source->disk, v->rooms.source->capacity_bytes);
        return false;
    }
    if (!v->known_holes)
        return true;
    v->bytes_done += v->known_end - v->cursor;
    v->cursor = v->known_end;
    know(v, v->cursor, false);
    v->more = true;
    return false;
}

/* The guest goes first. */
static unsigned depth_now(const struct verifier *v)
{
    return guest_works(v->rooms.load, v->rooms.host->now_ns) ? 1 : VERIFY_DEPTH;
}

static void begin_more(struct verifier *v)
{
    for (unsigned i = 0; i < VERIFY_DEPTH; i++) {
        if (v->scouting || v->cursor == v->rooms.source->capacity_bytes || v->in_use >= depth_now(v) ||
            v->not_before_ns > v->rooms.host->now_ns)
            return;
        if (v->compares[i].step != COMPARE_FREE)
            continue;
        if (!pass_holes(v))
            return;
        begin_compare(v, &v->compares[i]);
    }
}

static void end_if_over(struct verifier *v)
{
    struct vs_event event = {.kind = VS_EV_VERIFIED, .result = v->result};
    if (v->in_use > 0 || (v->result == 0 && v->cursor < v->rooms.source->capacity_bytes))
        return;
    v->running = false;
    own_memory_drop(v->buffers, BUFFERS_BYTES);
    mailbox_post(v->rooms.mailbox, &event);
}

void verifier_pump(struct verifier *v)
{
    v->more = false;
    if (!v->running)
        return;
    for (unsigned i = 0; i < VERIFY_DEPTH; i++)
        step_on(&v->compares[i]);
    if (v->result == 0 && v->rooms.state->now != VS_STEADY) /* what was under way then was not compared */
        v->result = -ENOTCONN;
    if (v->result == 0 && guest_is_taken_up(v->rooms.load))
        begin_more(v);
    end_if_over(v);
}

/* A checkpoint begins: what is being repaired is not covered by it. */
static void mark_in_flight(struct marker *m)
{
    struct verifier *v = container_of(m, struct verifier, marker);
    for (unsigned i = 0; i < VERIFY_DEPTH; i++) {
        const struct compare *c = &v->compares[i];
        if (c->step == COMPARE_REPAIR && is_current(c))
            difference_mark(v->rooms.difference, c->offset, c->length);
    }
}

uint64_t verifier_deadline_ns(const struct verifier *v)
{
    bool waits = v->running && v->result == 0 && v->not_before_ns > v->rooms.host->now_ns &&
                 v->cursor < v->rooms.source->capacity_bytes;
    return waits ? v->not_before_ns : UINT64_MAX;
}
