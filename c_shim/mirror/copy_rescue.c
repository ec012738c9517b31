/* SPDX-License-Identifier: Apache-2.0
 *
 * A region of the source that cannot be read as a whole is read again in
 * pieces, one after the other. It begins with RESCUE_BYTES; after a piece that
 * was read the next is twice as large, one that fails is halved, and one of
 * RESCUE_BYTES that fails is given up and listed as unreadable. So a few bad
 * blocks cost a few reads and not one for every block. All the while the region
 * keeps its place in the order.
 *
 * It is listed at once when it is given up, so that a guest write which
 * completes afterwards takes it off the list again.
 */
#include "copy_rescue.h"

#include <assert.h>

#include "bad_ranges.h"
#include "copy_put.h"
#include "source.h"

static void piece_read(struct disk_io *io);

static uint64_t at_most(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static void read_piece(struct region_copy *c)
{
    struct disk_io *io = &c->io.io;
    assert(c->piece > 0 && c->rescued + c->piece <= c->length);
    c->iov = (struct iovec){c->buffer + c->rescued, (size_t)c->piece};
    io->offset = c->offset + c->rescued;
    io->length = c->piece;
    io->iov = &c->iov;
    io->iov_count = 1;
    io->done = piece_read;
    disk_submit(c->copier->rooms.source->disk, io);
}

void rescue_start(struct region_copy *c)
{
    c->rescued = 0;
    c->piece = at_most(RESCUE_BYTES, c->length);
    read_piece(c);
}

static void give_up_piece(struct region_copy *c)
{
    c->rescue_error = c->io.io.result;
    range_set_add(&c->bad, c->io.io.offset, c->io.io.length);
    bad_ranges_not_read(c->copier->rooms.bad, c->io.io.offset, c->io.io.length);
}

/* One report for each stretch, not for each piece of it. */
static void report(struct region_copy *c)
{
    for (uint32_t i = 0; i < c->bad.count; i++) {
        c->io.io.offset = c->bad.range[i].offset;
        c->io.io.length = c->bad.range[i].length;
        c->io.io.result = c->rescue_error;
        report_io_error(c->copier->rooms.mailbox, VS_SOURCE, &c->io.io);
    }
}

static void piece_read(struct disk_io *io)
{
    struct region_copy *c = container_of(io, struct region_copy, io.io);
    uint64_t next = RESCUE_BYTES;
    if (!copy_is_current(c)) {
        copy_end(c);
        return;
    }
    if (io->result < 0 && c->piece > RESCUE_BYTES) {
        c->piece = (c->piece / 2 + RESCUE_BYTES - 1) / RESCUE_BYTES * RESCUE_BYTES;
        read_piece(c);
        return;
    }
    if (io->result < 0)
        give_up_piece(c);
    else
        next = 2 * c->piece;
    c->rescued += c->piece;
    c->piece = at_most(next, c->length - c->rescued);
    if (c->piece > 0) {
        read_piece(c);
        return;
    }
    report(c);
    copy_put_in_turn(c);
}
