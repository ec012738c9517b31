/* SPDX-License-Identifier: Apache-2.0
 *
 * Asks a destination over a network, of which nothing else is asked, whether it is still there. See idle_probe.h.
 */
#include "idle_probe.h"

#include <assert.h>
#include <errno.h>

#include "bounds.h"

static void probed(struct destination_io *io, bool current);

void idle_probe_init(struct idle_probe *p, const struct idle_probe_rooms *rooms)
{
    p->rooms = *rooms;
    p->look_ns = UINT64_MAX;
    p->io.done = probed;
}

static uint64_t answered(const vs_disk *disk)
{
    uint64_t sum = 0;
    for (int op = 0; op < VS_DISK_OPS; op++)
        sum += disk->stats.op[op].operations;
    return sum;
}

void idle_probe_begin(struct idle_probe *p)
{
    const vs_disk *disk = p->rooms.destination->disk;
    p->look_ns = UINT64_MAX;
    if (!disk || !(disk->can & DISK_IS_FAR))
        return;
    p->answered = answered(disk);
    p->look_ns = p->rooms.host->now_ns + IDLE_PROBE_NS;
}

/* What the disk says, or the server does: that this client has nothing to do with it any more. */
static bool tells_loss(int result)
{
    return result == -ENOTCONN || result == -ESHUTDOWN || result == -ETIMEDOUT;
}

static void probed(struct destination_io *io, bool current)
{
    struct idle_probe *p = container_of(io, struct idle_probe, io);
    struct destination *d = p->rooms.destination;
    p->in_flight = false;
    if (!current || io->io.result == 0)
        return;
    if (tells_loss(io->io.result))
        d->lost(d, VS_REASON_DESTINATION_LOST, io->io.result);
    else
        p->look_ns = p->rooms.host->now_ns + IDLE_PROBE_AFTER_ERROR_NS;
}

static void ask(struct idle_probe *p)
{
    vs_disk *disk = p->rooms.destination->disk;
    uintptr_t off = (uintptr_t)p->room % PROBE_BYTES;
    assert(disk->block_bytes <= PROBE_BYTES && disk->memory_align_bytes <= PROBE_BYTES && !p->in_flight);
    p->iov = (struct iovec){.iov_base = p->room + (off ? PROBE_BYTES - off : 0), .iov_len = disk->block_bytes};
    p->io.io = (struct disk_io){.kind = VS_DISK_READ, .length = disk->block_bytes, .iov = &p->iov, .iov_count = 1};
    p->in_flight = true;
    destination_submit(p->rooms.destination, &p->io);
}

void idle_probe_pump(struct idle_probe *p)
{
    const vs_disk *disk = p->rooms.destination->disk;
    uint64_t now = p->rooms.host->now_ns, so_far;
    if (now < p->look_ns || !disk)
        return;
    so_far = answered(disk);
    /* A switch that is about to exchange the disks waits for what is under way. */
    if (so_far == p->answered && !disk->stats.in_flight && !(p->rooms.load->holds & GUEST_HOLD_SWITCH))
        ask(p);
    p->answered = so_far + p->in_flight;
    p->look_ns = now + IDLE_PROBE_NS;
}
