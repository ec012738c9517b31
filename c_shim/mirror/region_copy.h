/* SPDX-License-Identifier: Apache-2.0
 *
 * A region copy, and the pool of them. copier.c says which steps it takes, and why.
 */
#ifndef VS_REGION_COPY_H
#define VS_REGION_COPY_H

#include <stdbool.h>
#include <stdint.h>

#include "copy_pace.h"
#include "copy_scout.h"
#include "destination.h"
#include "difference.h"
#include "bounds.h"
#include "range_set.h"
#include "range_slots.h"

struct bad_ranges;
struct copier;
struct guest_flush;
struct guest_load;
struct mirror_state;
struct repl_log;
struct source;
struct uncopied;

/* Looking: whether the hole is still one. Read: waits for its turn on the destination; granted: has it. */
enum copy_step { COPY_FREE, COPY_LOOKING, COPY_READING, COPY_READ, COPY_GRANTED, COPY_PUTTING };

struct region_copy {
    struct copier *copier;
    uint64_t epoch;
    enum copy_step step;
    bool hole; /* nothing was read: zeroes */
    uint64_t offset, length;
    uint64_t put;         /* bytes dealt with on the destination */
    uint64_t sparse;      /* of these: holes and zeroes */
    uint64_t piece;       /* bytes of the write or zero in flight; of the read, while it is rescued */
    uint64_t rescued;     /* bytes looked through after its read had failed (copy_rescue.c) */
    int rescue_error;     /* why something of it was given up */
    uint64_t pace_round;  /* when its request was submitted; 0: at full speed */
    struct range_set bad; /* on the disk: what could not be read of it */
    uint8_t *buffer;      /* COPY_BYTES */
    struct iovec iov;
    struct range_slot slot;
    struct destination_io io; /* of either disk: one after the other */
};

/* The disk grows by a range, and copies it in steady. */
struct copy_of_growth {
    void (*unreadable)(struct copy_of_growth *g, int error);
};

/* What the copier needs of other rooms. */
struct copier_rooms {
    struct destination *destination;
    const struct source *source;
    struct mirror_state *state;
    struct uncopied *uncopied;
    struct difference *difference;
    struct bad_ranges *bad;
    const struct repl_log *log;
    const struct guest_flush *flush;
    const struct guest_load *load;
    struct disk_host *host;
    struct mailbox *mailbox;
    uint64_t give_way_bytes; /* so much of the log in use: replication goes first; 0: never */
};

struct copier {
    struct copier_rooms rooms;
    struct marker marker;
    struct region_copy copies[COPY_DEPTH_MAX];
    uint8_t *buffers;
    unsigned depth;        /* at most so many at once */
    bool granted;          /* a copy that was read has got its turn on the destination */
    struct copy_pace pace; /* while the guest works */
    /* What the disks have said last. It may be outdated: data is read as it is then, and a hole is looked at again when
     * it has its place. */
    struct copy_scout scouts[COPY_DISKS];
    uint64_t cursor;
    uint64_t bytes_total, bytes_done, bytes_sparse;
    uint64_t speed_bytes_per_s; /* 0: no limit */
    uint64_t not_before_ns;     /* by the speed limit */
    struct copy_of_growth *growth;
};

/* All buffers of the pool. */
#define COPY_BUFFERS_BYTES ((uint64_t)COPY_DEPTH_MAX * COPY_BYTES)

/* The guest goes first: what it asks of a disk waits there behind what the copy has in flight. While it works that
 * is as little as its pace says; never nothing, so that the copy ends. */
bool copy_yields(const struct copier *k);
/* By the speed limit. */
void copy_counts_as(struct copier *k, uint64_t bytes);

/* Its mirror is still there. */
bool copy_is_current(const struct region_copy *c);
void copy_ask_source(struct region_copy *c, void (*done)(struct disk_io *io));
void copy_ask_destination(struct region_copy *c, void (*done)(struct destination_io *io, bool current));
/* A request of it took so long. */
void copy_took(struct region_copy *c, enum copy_disk disk);
/* Back to the pool; its slot is given back by the caller or by the mirror's end. */
void copy_end(struct region_copy *c);
/* The same, and its region is done. */
void copy_done(struct region_copy *c);
/* It is as if it had never been placed. */
void copy_displace(struct region_copy *c);

#endif
