/* SPDX-License-Identifier: Apache-2.0
 *
 * The bulk copy while the guest runs. See copier.c for why no region has to be
 * copied twice.
 */
#ifndef VS_COPIER_H
#define VS_COPIER_H

#include <stdbool.h>
#include <stdint.h>

#include "copy_pace.h"
#include "copy_scout.h"
#include "destination.h"
#include "limits.h"
#include "range_set.h"
#include "range_slots.h"

struct vs_engine;

/* Looking: whether the hole is still one. Read: waits for its turn on the destination; granted: has it. */
enum copy_step { COPY_FREE, COPY_LOOKING, COPY_READING, COPY_READ, COPY_GRANTED, COPY_PUTTING };

struct region_copy {
    struct vs_engine *engine;
    uint64_t epoch;
    enum copy_step step;
    bool hole;         /* nothing was read: zeroes */
    uint64_t offset, length;
    uint64_t put;      /* bytes dealt with on the destination */
    uint64_t sparse;   /* of these: holes and zeroes */
    uint64_t piece;    /* bytes of the write or zero in flight; of the read, while it is rescued */
    uint64_t rescued;  /* bytes looked through after its read had failed (copy_rescue.c) */
    int rescue_error;  /* why something of it was given up */
    uint64_t pace_round; /* when its request was submitted; 0: at full speed */
    struct range_set bad; /* on the disk: what could not be read of it */
    uint8_t *buffer;   /* COPY_BYTES */
    struct iovec iov;
    struct range_slot slot;
    struct destination_io io; /* of either disk: one after the other */
};

struct copier {
    struct region_copy copies[COPY_DEPTH_MAX];
    uint8_t *buffers;
    unsigned depth;     /* at most so many at once */
    bool granted;       /* a copy that was read has got its turn on the destination */
    struct copy_pace pace; /* while the guest works */
    unsigned in_use;
    /* What the disks have said last. It may be outdated: data is read as it is then, and a hole is looked at again when
     * it has its place. */
    struct copy_scout scouts[COPY_DISKS];
    uint64_t cursor;
    uint64_t bytes_total, bytes_done, bytes_sparse;
    uint64_t speed_bytes_per_s; /* 0: no limit */
    uint64_t not_before_ns;     /* by the speed limit */
};

int copier_init(struct vs_engine *e);
void copier_free(struct vs_engine *e);
/* All regions that may differ are to be copied. */
void copier_start(struct vs_engine *e);
/* In steady: this range is to be copied, too (grow.c). */
void copier_add(struct vs_engine *e, uint64_t offset, uint64_t length);
void copier_pump(struct vs_engine *e);
/* A checkpoint begins: what is being copied is not covered by it. */
void copier_mark_in_flight(struct vs_engine *e);
/* The destination is given up. */
void copier_drop(struct vs_engine *e);
/* For copy_rescue.c: its bytes are there, but for those in "bad". */
void copier_was_read(struct region_copy *c);
/* Its mirror is gone. */
void copier_end(struct region_copy *c);
bool copier_current(const struct region_copy *c);
bool copier_finished(const struct vs_engine *e);
uint64_t copier_deadline_ns(const struct vs_engine *e);

#endif
