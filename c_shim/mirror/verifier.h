/* SPDX-License-Identifier: Apache-2.0
 *
 * Compares both disks while the guest runs and the mirror is steady. See verifier.c.
 */
#ifndef VS_VERIFIER_H
#define VS_VERIFIER_H

#include <stdbool.h>
#include <stdint.h>

#include "destination.h"
#include "difference.h"
#include "range_set.h"
#include "bounds.h"
#include "range_slots.h"

struct bad_ranges;
struct guest_load;
struct mirror_state;
struct source;

enum compare_step {
    COMPARE_FREE,
    COMPARE_GLANCE,   /* both are being read, nothing is held */
    COMPARE_TURN,     /* they differed: waits until no write of the guest is on its way there */
    COMPARE_MIRRORED, /* holds the range on the source; waits until the destination has all that was written */
    COMPARE_READ,     /* both are being read, and nothing can change */
    COMPARE_REPAIR,   /* the source's bytes are being written to the destination, and flushed there */
    COMPARE_AGAIN     /* and are being read back */
};

struct verifier;

struct compare {
    struct verifier *verifier;
    enum compare_step step;
    uint64_t epoch; /* of the mirror */
    uint64_t offset, length;
    uint64_t generation; /* the destination must have all up to it */
    unsigned reads;      /* in flight */
    uint64_t found;      /* bytes that differ */
    bool source_failed, destination_failed;
    bool holds_source, holds_destination;
    uint8_t *source_data, *destination_data;
    struct iovec source_iov, destination_iov;
    struct disk_io source_io;
    struct destination_io destination_io;
    struct range_slot source_slot, destination_slot;
};

/* What it needs of other rooms. */
struct verifier_rooms {
    struct destination *destination;
    struct source *source;
    const struct vs_counts *counts;
    struct mirror_state *state;
    const struct bad_ranges *bad;
    struct difference *difference;
    const struct guest_load *load;
    struct disk_host *host;
    struct mailbox *mailbox;
};

struct verifier {
    struct verifier_rooms rooms;
    struct marker marker;
    bool running, repair;
    int result; /* why it ends early */
    uint64_t cursor;
    uint64_t bytes_done, bytes_skipped, bytes_differing, bytes_repaired;
    struct range_set differing; /* where; ranges as exact as a block */
    uint64_t speed_bytes_per_s; /* 0: no limit */
    uint64_t not_before_ns;
    bool more;
    /* What the disks have said of what lies at the cursor; the question may outlive a verification. */
    struct disk_io scout;
    const struct vs_disk *scout_disk; /* that it asks */
    bool scouting, known_holes;
    uint64_t scout_epoch, known_end;
    unsigned in_use;
    uint8_t *buffers;
    struct compare compares[VERIFY_DEPTH];
};

int verifier_init(struct verifier *v, const struct verifier_rooms *rooms);
void verifier_free(struct verifier *v);
/* 0, -ENOTCONN (not steady) or -EBUSY. VS_EV_VERIFIED tells of the end. */
int verifier_start(struct verifier *v, bool repair, uint64_t speed_bytes_per_s);
/* Ends it as soon as what it has in flight is over; -ENOENT: there is none. */
int verifier_stop(struct verifier *v);
void verifier_pump(struct verifier *v);
uint64_t verifier_deadline_ns(const struct verifier *v);

#endif
