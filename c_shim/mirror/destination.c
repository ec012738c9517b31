/* SPDX-License-Identifier: Apache-2.0
 *
 * Sends operations to the destination, notices those that fail, and lets go of a destination that is given up. See
 * destination.h.
 */
#include "destination.h"

#include <assert.h>

#include "mailbox.h"

static void former_closed(struct disk_io *closing);

void destination_init(struct destination *d, struct mailbox *mailbox,
                      void (*lost)(struct destination *d, uint32_t reason, int error))
{
    *d = (struct destination){.epoch = 1, .mailbox = mailbox, .lost = lost};
    d->closing.kind = VS_DISK_CLOSE;
    d->closing.done = former_closed;
    range_slots_init(&d->slots);
}

void report_io_error(struct mailbox *mailbox, uint32_t role, const struct disk_io *io)
{
    struct vs_event event = {.kind = VS_EV_IO_ERROR,
                             .result = io->result,
                             .disk_role = role,
                             .op = io->kind,
                             .offset = io->kind == VS_DISK_FLUSH ? 0 : io->offset,
                             .length = io->kind == VS_DISK_FLUSH ? 0 : io->length};
    mailbox_post(mailbox, &event);
}

/* ---- an operation --------------------------------------------------------- */

static uint32_t reason_of(uint32_t kind)
{
    return kind == VS_DISK_FLUSH ? VS_REASON_DESTINATION_FLUSH : VS_REASON_DESTINATION_WRITE;
}

static bool loses(uint32_t kind)
{
    return kind != VS_DISK_READ && kind < VS_DISK_OPS;
}

static void completed(struct disk_io *io)
{
    struct destination_io *x = container_of(io, struct destination_io, io);
    struct destination *d = x->destination;
    if (io->result < 0)
        report_io_error(d->mailbox, VS_DESTINATION, io);
    if (io->result < 0 && x->epoch == d->epoch && loses(io->kind))
        d->lost(d, reason_of(io->kind), io->result);
    x->done(x, x->epoch == d->epoch);
}

void destination_submit(struct destination *d, struct destination_io *io)
{
    io->destination = d;
    io->epoch = d->epoch;
    io->io.done = completed;
    disk_submit(d->disk, &io->io);
}

/* ---- which disk it is ------------------------------------------------------- */

void destination_attach(struct destination *d, vs_disk *disk, struct disk_host *host)
{
    assert(!d->disk && !d->former);
    disk_adopt(disk, host);
    d->disk = disk;
    range_slots_init(&d->slots);
}

void destination_give_up(struct destination *d)
{
    d->epoch++;
    d->former = d->disk;
    d->cut_off = false;
    d->disk = NULL;
    range_slots_init(&d->slots);
}

static void former_closed(struct disk_io *closing)
{
    struct destination *d = container_of(closing, struct destination, closing);
    struct vs_event event = {.kind = VS_EV_FENCE_CLEAR, .value = d->former->unanswered};
    disk_free(d->former);
    d->former = NULL;
    mailbox_post(d->mailbox, &event);
}

uint64_t destination_oldest_of_former_ns(const struct destination *d)
{
    bool waits = d->former && !d->cut_off && d->former->can & DISK_CAN_BE_CUT_OFF;
    return waits ? disk_oldest_ns(d->former) : UINT64_MAX;
}

void destination_cut_off_former(struct destination *d)
{
    d->cut_off = disk_cut_off(d->former);
}

void destination_close_former(struct destination *d)
{
    assert(d->former->stats.in_flight == 0);
    disk_submit(d->former, &d->closing);
}

vs_disk *destination_exchange(struct destination *d, vs_disk *other)
{
    vs_disk *disk = d->disk;
    d->disk = other;
    d->epoch += other == NULL;
    return disk;
}
