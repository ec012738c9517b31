/* SPDX-License-Identifier: Apache-2.0
 *
 * The disk becomes larger while the guest runs. See grow.c.
 */
#ifndef VS_GROW_H
#define VS_GROW_H

#include <stdbool.h>
#include <stdint.h>

#include "destination.h"

struct vs_engine;

/* How large a disk is by now, which is asked of it. */
struct size_question {
    bool asked;
    uint64_t token;
    struct vs_engine *engine;
    struct disk_io io;
};

struct grow {
    bool running;        /* the new range is being copied to the destination */
    bool flushing;
    bool undoing;        /* it was stopped, and the maps are still those of the larger disk */
    uint64_t token;
    uint64_t capacity_bytes;
    struct destination_io flush;
    struct size_question size_question[2]; /* by enum vs_disk_role */
};

/* Answers the token with the size that the disk of this role has by now. */
void grow_measure(struct vs_engine *e, uint64_t token, uint64_t role);
/* Answers the token when the guest may use the new capacity. Refused: -EBUSY (copying, switching, growing, or one that was stopped is not over), -EINVAL (not larger, no whole blocks), -ENOSPC (a disk is smaller). */
void grow_begin(struct vs_engine *e, uint64_t token, const struct vs_grow *wanted);
/* The disk stays as large as it is, and the token is answered with "error". Nothing, where none is under way. */
void grow_stop(struct vs_engine *e, int error);
void grow_pump(struct vs_engine *e);

#endif
