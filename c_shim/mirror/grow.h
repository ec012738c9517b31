/* SPDX-License-Identifier: Apache-2.0
 *
 * The disk becomes larger while the guest runs. See grow.c.
 */
#ifndef VS_GROW_H
#define VS_GROW_H

#include <stdbool.h>
#include <stdint.h>

#include "copier.h"
#include "destination.h"

struct activity;
struct guest_load;
struct mirror_state;
struct source;
struct uncopied;

/* How large a disk is by now, which is asked of it. */
struct size_question {
    bool asked;
    uint64_t token;
    struct mailbox *mailbox;
    struct disk_io io;
};

/* What it needs of other rooms. */
struct grow_rooms {
    struct destination *destination;
    struct source *source;
    struct mirror_state *state;
    struct uncopied *uncopied;
    struct copier *copier;
    struct difference *difference;
    struct activity *activity;
    uint64_t *request_limit_bytes;
    const struct guest_load *load;
    struct disk_host *host;
    struct mailbox *mailbox;
};

struct grow {
    struct grow_rooms rooms;
    struct copy_of_growth copy;
    bool running; /* the new range is being copied to the destination */
    bool flushing;
    bool undoing; /* it was stopped, and the maps are still those of the larger disk */
    uint64_t token;
    uint64_t capacity_bytes;
    struct destination_io flush;
    struct size_question size_question[2]; /* by enum vs_disk_role */
};

void grow_init(struct grow *g, const struct grow_rooms *rooms);
/* Answers the token with the size that the disk of this role has by now. */
void grow_measure(struct grow *g, uint64_t token, uint64_t role);
/* Answers the token when the guest may use the new capacity. Refused: -EBUSY (copying, switching, growing, or one that
 * was stopped is not over), -EINVAL (not larger, no whole blocks), -ENOSPC (a disk is smaller). */
void grow_begin(struct grow *g, uint64_t token, const struct vs_grow *wanted);
/* The disk stays as large as it is, and the token is answered with "error". Nothing, where none is under way. */
void grow_stop(struct grow *g, int error);
void grow_pump(struct grow *g);

#endif
