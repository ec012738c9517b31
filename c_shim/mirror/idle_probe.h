/* SPDX-License-Identifier: Apache-2.0
 *
 * A destination over a network may go while nothing is asked of it: its server is stopped, its host is gone, this
 * client was shut out. Then the mirror would be called steady until the guest's next write. So it is asked for a block
 * now and then, as long as nothing else is. Where that has no answer, it is a request like any other: the destination
 * is lost when its time is over (mirror.c).
 *
 * Local disks are never asked.
 */
#ifndef VS_IDLE_PROBE_H
#define VS_IDLE_PROBE_H

#include "destination.h"
#include "guest_side.h"

#define PROBE_BYTES 4096

struct idle_probe_rooms {
    struct destination *destination;
    const struct guest_load *load;
    struct disk_host *host;
};

struct idle_probe {
    struct idle_probe_rooms rooms;
    struct destination_io io;
    struct iovec iov;
    bool in_flight;
    uint64_t look_ns;              /* UINT64_MAX: not at all */
    uint64_t answered;             /* operations of the destination, when it was looked at last */
    uint8_t room[2 * PROBE_BYTES]; /* for a block that begins at a multiple of PROBE_BYTES */
};

void idle_probe_init(struct idle_probe *p, const struct idle_probe_rooms *rooms);
/* There is another destination, or none. */
void idle_probe_begin(struct idle_probe *p);
void idle_probe_pump(struct idle_probe *p);
/* When idle_probe_pump() has to look again. */
static inline uint64_t idle_probe_deadline_ns(const struct idle_probe *p)
{
    return p->look_ns;
}

#endif
