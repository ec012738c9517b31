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

#include "bad_ranges.h"
#include "copy_put.h"
#include "copy_rescue.h"
#include "difference.h"
#include "guest_side.h"
#include "mailbox.h"
#include "mirror_state.h"
#include "own_memory.h"
#include "repl_log.h"
#include "source.h"
#include "uncopied.h"

static void mark_in_flight(struct marker *m);

int copier_init(struct copier *k, const struct copier_rooms *rooms, unsigned depth)
{
    *k = (struct copier){.rooms = *rooms, .depth = depth, .marker.mark_in_flight = mark_in_flight};
    if (k->depth < 1 || k->depth > COPY_DEPTH_MAX)
        return -EINVAL;
    k->buffers = own_memory_map(COPY_BUFFERS_BYTES);
    if (!k->buffers)
        return -ENOMEM;
    for (unsigned i = 0; i < COPY_DEPTH_MAX; i++) {
        k->copies[i].copier = k;
        k->copies[i].buffer = k->buffers + (size_t)i * COPY_BYTES;
        copy_put_init(&k->copies[i]);
    }
    for (unsigned i = 0; i < COPY_DISKS; i++)
        copy_scout_init(&k->scouts[i], rooms->destination);
    difference_add_marker(rooms->difference, &k->marker);
    return 0;
}

void copier_free(struct copier *k)
{
    own_memory_unmap(k->buffers, COPY_BUFFERS_BYTES);
}

static void forget_holes(struct copier *k)
{
    for (unsigned i = 0; i < COPY_DISKS; i++)
        copy_scout_forget(&k->scouts[i]);
}

void copier_start(struct copier *k)
{
    struct dirty_map *regions = &k->rooms.uncopied->regions;
    dirty_map_add(regions, &k->rooms.difference->differs);
    bad_ranges_copy_begins(k->rooms.bad);
    copy_pace_init(&k->pace, k->depth, 1ull << regions->region_shift, k->rooms.host->now_ns);
    /* The cursor stays where the last copy left off: one that always began with what the guest keeps writing
     * would come no further when it is cut off again and again. */
    k->bytes_total = dirty_map_bytes(regions);
    k->bytes_done = k->bytes_sparse = 0;
    k->not_before_ns = 0;
    forget_holes(k);
}

void copier_add(struct copier *k, uint64_t offset, uint64_t length, struct copy_of_growth *growth)
{
    dirty_map_set(&k->rooms.uncopied->regions, offset, length);
    k->rooms.uncopied->growing = true;
    k->growth = growth;
    k->cursor = 0;
    k->bytes_total = length;
    forget_holes(k);
    k->bytes_done = k->bytes_sparse = 0;
}

void copier_set_speed(struct copier *k, uint64_t bytes_per_s)
{
    k->speed_bytes_per_s = bytes_per_s;
    k->not_before_ns = 0;
}

static bool copying(const struct copier *k)
{
    enum vs_mirror_state state = k->rooms.state->now;
    bool grows = state == VS_STEADY && k->rooms.uncopied->growing;
    bool is_left = k->rooms.load->holds & GUEST_HOLD_SOURCE_FAILED; /* a source that is left is read no more */
    return state == VS_SYNCING || (grows && !is_left);
}

/* ---- reading ----------------------------------------------------------- */

/* In steady, of a range that is no part of the disk yet, and does not become one. */
static void new_range_unreadable(struct region_copy *c)
{
    struct copier *k = c->copier;
    report_io_error(k->rooms.mailbox, VS_SOURCE, &c->io.io);
    range_release(&k->rooms.destination->slots, &c->slot);
    copy_end(c);
    k->growth->unreadable(k->growth, c->io.io.result);
}

static void read_done(struct disk_io *io)
{
    struct region_copy *c = container_of(io, struct region_copy, io.io);
    if (!copy_is_current(c)) {
        copy_end(c);
    } else if (io->result < 0 && c->copier->rooms.state->now == VS_STEADY) {
        new_range_unreadable(c);
    } else if (io->result < 0) {
        rescue_start(c); /* it reports what is lost */
    } else {
        copy_took(c, COPY_SOURCE);
        copy_put_in_turn(c);
    }
}

/* Takes its place in the order; only then may the source be looked at. */
static void place(struct region_copy *c, uint64_t offset, uint64_t length)
{
    struct copier *k = c->copier;
    struct uncopied *u = k->rooms.uncopied;
    uint64_t whole = offset >> u->regions.region_shift << u->regions.region_shift; /* of a region, a part may do */
    c->epoch = k->rooms.destination->epoch;
    c->step = COPY_READING;
    c->offset = offset;
    c->length = length;
    c->put = 0;
    c->sparse = 0;
    c->hole = false;
    c->bad.count = 0;
    c->io.io.thread = io_thread_beside(&k->rooms.host->threads, (unsigned)(c - k->copies));
    u->in_flight++;
    k->cursor = offset + length;
    difference_mark(k->rooms.difference, offset, length);
    dirty_map_clear(&u->regions, whole, offset + length - whole);
    range_take(&k->rooms.destination->slots, &c->slot, offset, length);
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
    copy_counts_as(c->copier, c->length);
    copy_ask_source(c, read_done);
}

/* The first run at or after "from". In steady nothing of what the guest can write to already, and the region across
 * the old end may begin with such (grow.c). */
static bool find_run(const struct copier *k, uint64_t from, uint64_t most, uint64_t *offset, uint64_t *run)
{
    uint64_t first = k->rooms.state->now == VS_STEADY ? k->rooms.source->capacity_bytes : 0;
    if (!dirty_map_find(&k->rooms.uncopied->regions, from, most, offset, run))
        return false;
    if (*offset < first) {
        assert(*run > first - *offset);
        *run -= first - *offset;
        *offset = first;
    }
    return true;
}

/* ---- holes ------------------------------------------------------------- */

/* Whether it still was a hole when it had its place. */
static void hole_looked(struct disk_io *io)
{
    struct region_copy *c = container_of(io, struct region_copy, io.io);
    if (!copy_is_current(c)) {
        copy_end(c);
    } else if (disk_found_hole(io)) {
        c->hole = true;
        copy_put_in_turn(c);
    } else { /* a write has filled it */
        copy_scout_learn(&c->copier->scouts[COPY_SOURCE], io);
        copy_displace(c);
    }
}

/* How much of the run lies before "end", in whole regions. */
static uint64_t whole_regions(const struct copier *k, uint64_t offset, uint64_t run, uint64_t end)
{
    unsigned shift = k->rooms.uncopied->regions.region_shift;
    if (end >= offset + run)
        return run;
    end = end >> shift << shift;
    return end > offset ? end - offset : 0;
}

/* Where the run begins with a hole of the source: if the destination has one too there is nothing to do, and it is
 * passed over in large steps; else zeroes are put there, in parts like any other. */
static bool start_hole(struct region_copy *c, uint64_t offset, uint64_t run)
{
    struct copier *k = c->copier;
    const struct copy_scout *source = &k->scouts[COPY_SOURCE], *there = &k->scouts[COPY_DESTINATION];
    uint64_t length = 0, large;
    if (!source->hole)
        return false;
    if (there->hole && find_run(k, offset, COPY_HOLE_BYTES, &offset, &large))
        length = whole_regions(k, offset, large, source->end < there->end ? source->end : there->end);
    if (length == 0)
        length = whole_regions(k, offset, run, source->end);
    if (length == 0)
        return false;
    place(c, offset, length);
    c->step = COPY_LOOKING;
    c->io.io.kind = VS_DISK_EXTENTS;
    c->io.io.to_data_end = false;
    c->io.io.offset = offset;
    c->io.io.length = length;
    copy_ask_source(c, hole_looked);
    return true;
}

/* What the source has at offset, and where that is a hole the destination too; else they are asked. */
static bool is_known(struct copier *k, uint64_t offset)
{
    struct copy_scout *scouts = k->scouts;
    uint64_t end = k->rooms.uncopied->regions.capacity_bytes;
    return copy_scout_knows(&scouts[COPY_SOURCE], k->rooms.source->disk, offset, end) &&
           (!scouts[COPY_SOURCE].hole ||
            copy_scout_knows(&scouts[COPY_DESTINATION], k->rooms.destination->disk, offset, end));
}

/* ---- what is begun ------------------------------------------------------- */

static unsigned reads_in_flight(const struct copier *k)
{
    unsigned count = 0;
    for (unsigned i = 0; i < COPY_DEPTH_MAX; i++)
        count += k->copies[i].step == COPY_READING;
    return count;
}

/* While the log fills replication goes first, or the guest would get ahead. */
static bool gives_way(const struct copier *k)
{
    return k->rooms.give_way_bytes && ring_used(&k->rooms.log->ring) >= k->rooms.give_way_bytes;
}

static bool may_begin(const struct copier *k)
{
    unsigned in_flight = k->rooms.uncopied->in_flight;
    if (gives_way(k))
        return false;
    if (k->not_before_ns > k->rooms.host->now_ns) /* by the speed limit */
        return false;
    if (copy_yields(k))
        return in_flight < copy_pace_parts(&k->pace) && reads_in_flight(k) < copy_pace_reads(&k->pace);
    return in_flight < k->depth;
}

/* What is to be copied next: from the cursor to the disk's end, then from its beginning. */
static bool next_run(const struct copier *k, uint64_t *offset, uint64_t *run)
{
    uint64_t most = copy_yields(k) ? copy_pace_part_bytes(&k->pace) : COPY_BYTES;
    return find_run(k, k->cursor, most, offset, run) || find_run(k, 0, most, offset, run);
}

static struct region_copy *free_copy(struct copier *k)
{
    for (unsigned i = 0; i < COPY_DEPTH_MAX; i++)
        if (k->copies[i].step == COPY_FREE)
            return &k->copies[i];
    return NULL;
}

void copier_pump(struct copier *k)
{
    uint64_t offset, run;
    copy_put_granted(k);
    if (!copying(k) || k->rooms.state->capture.uncaptured)
        return;
    while (may_begin(k) && next_run(k, &offset, &run) && is_known(k, offset)) {
        struct region_copy *c = free_copy(k);
        if (start_hole(c, offset, run))
            continue;
        place(c, offset, run);
        start_reading(c);
    }
}

uint64_t copier_deadline_ns(const struct copier *k)
{
    bool waits = copying(k) && k->rooms.uncopied->regions.dirty && k->not_before_ns > k->rooms.host->now_ns;
    return waits ? k->not_before_ns : UINT64_MAX;
}

/* A checkpoint begins: what is being copied is not covered by it. */
static void mark_in_flight(struct marker *m)
{
    struct copier *k = container_of(m, struct copier, marker);
    for (unsigned i = 0; i < COPY_DEPTH_MAX; i++) {
        const struct region_copy *c = &k->copies[i];
        if (c->step != COPY_FREE && copy_is_current(c))
            difference_mark(k->rooms.difference, c->offset, c->length);
    }
}

void copier_drop(struct copier *k)
{
    for (unsigned i = 0; i < COPY_DEPTH_MAX; i++)
        if (k->copies[i].step == COPY_READ || k->copies[i].step == COPY_GRANTED)
            copy_end(&k->copies[i]);
    dirty_map_clear_all(&k->rooms.uncopied->regions);
}
