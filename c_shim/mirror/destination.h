/* SPDX-License-Identifier: Apache-2.0
 *
 * The disk that the source is mirrored to, and what becomes of an operation on it.
 *
 * An operation belongs to the mirror for which it was submitted. "epoch" changes whenever a destination is given up:
 * an operation for a former one finds that out when it completes, and moves nothing.
 *
 * Whatever fails is reported. A destination that fails a write, a zeroing or a flush is lost at once: lost() is called
 * before done(), so that no count passes over what is not there. A read that fails is its caller's matter.
 */
#ifndef VS_DESTINATION_H
#define VS_DESTINATION_H

#include <stdbool.h>
#include <stdint.h>

#include "disk.h"
#include "range_slots.h"

struct mailbox;
struct destination;

struct destination_io {
    struct disk_io io; /* set by the caller, but for io.done */
    struct destination *destination;
    uint64_t epoch;
    /* current: its mirror is still the one there is, and what was written is there (a read may have failed). */
    void (*done)(struct destination_io *d, bool current);
};

struct destination {
    vs_disk *disk;   /* NULL: there is none */
    vs_disk *former; /* given up with operations in flight: fenced until they are over, and it is closed */
    bool cut_off;    /* so was the former one */
    uint64_t epoch;
    struct range_slots slots; /* turns of what overlaps: replicas, region copies, repairs */
    struct disk_io closing;   /* of the former one */
    struct mailbox *mailbox;
    void (*lost)(struct destination *d, uint32_t reason, int error);
};

void destination_init(struct destination *d, struct mailbox *mailbox,
                      void (*lost)(struct destination *d, uint32_t reason, int error));
void destination_submit(struct destination *d, struct destination_io *io);

/* There is none yet. */
void destination_attach(struct destination *d, vs_disk *disk, struct disk_host *host);
/* It becomes the former one. Its turns are forgotten as a whole: nobody gives back one of a former epoch. */
void destination_give_up(struct destination *d);
/* When the former one, if it can be cut off and was not, last answered; UINT64_MAX: nothing is in flight there. */
uint64_t destination_oldest_of_former_ns(const struct destination *d);
void destination_cut_off_former(struct destination *d);
/* Nothing is in flight to the former one, and nothing will be: it is closed. Closing may wait for the disk, and the
 * fence holds until it is over: VS_EV_FENCE_CLEAR. */
void destination_close_former(struct destination *d);
/* A switch: returns the disk, and has another one in its place. NULL: none, and its mirror is over. */
vs_disk *destination_exchange(struct destination *d, vs_disk *other);

/* VS_EV_IO_ERROR, of either disk. */
void report_io_error(struct mailbox *mailbox, uint32_t role, const struct disk_io *io);

static inline bool destination_attached(const struct destination *d)
{
    return d->disk != NULL;
}

#endif
