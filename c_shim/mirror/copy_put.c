/* SPDX-License-Identifier: Apache-2.0
 *
 * A region that was read is put onto the destination piece by piece, each all zeroes or none: zeroes only where there
 * is no hole already. Passed over is what must not be put (copier.c): what could not be read, and what the destination
 * holds better.
 */
#include "copy_put.h"

#include <string.h>

#include "bad_ranges.h"

static void piece_done(struct destination_io *io, bool current);
static void destination_looked(struct destination_io *io, bool current);

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
    const struct range_set *sets[] = {&c->bad, &c->copier->rooms.bad->spared};
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
    copy_ask_destination(c, done);
}

static void put_next(struct region_copy *c)
{
    uint64_t end = next_good(c);
    if (c->put == c->length)
        copy_done(c);
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
        copy_end(c);
    } else if (disk_found_hole(&io->io)) {
        c->sparse += c->piece;
        c->put += c->piece;
        put_next(c);
    } else if (c->piece > COPY_BYTES) { /* it was a hole on both disks just now */
        copy_scout_learn(&c->copier->scouts[COPY_DESTINATION], &io->io);
        copy_displace(c);
    } else {
        if (c->hole)
            copy_counts_as(c->copier, c->piece);
        c->sparse += c->piece;
        submit_piece(c, VS_DISK_ZERO, piece_done);
    }
}

static void piece_done(struct destination_io *io, bool current)
{
    struct region_copy *c = container_of(io, struct region_copy, io);
    if (!current) {
        copy_end(c);
        return;
    }
    if (io->io.kind == VS_DISK_WRITE)
        copy_took(c, COPY_DESTINATION);
    c->put += c->piece;
    put_next(c);
}

/* ---- its turn ------------------------------------------------------------ */

static void slot_granted(struct range_slot *slot)
{
    struct region_copy *c = container_of(slot, struct region_copy, slot);
    if (c->step != COPY_READ || !copy_is_current(c))
        return;
    /* Not put_next() at once: it may end the copy, and a grant must not give back a slot. */
    c->step = COPY_GRANTED;
    c->copier->granted = true;
}

void copy_put_init(struct region_copy *c)
{
    c->slot.grant = slot_granted;
}

void copy_put_in_turn(struct region_copy *c)
{
    c->step = c->slot.granted ? COPY_PUTTING : COPY_READ;
    if (c->slot.granted)
        put_next(c);
}

void copy_put_granted(struct copier *k)
{
    if (!k->granted)
        return;
    k->granted = false;
    for (unsigned i = 0; i < COPY_DEPTH_MAX; i++) {
        struct region_copy *c = &k->copies[i];
        if (c->step != COPY_GRANTED)
            continue;
        c->step = COPY_PUTTING;
        put_next(c);
    }
}
