/* SPDX-License-Identifier: Apache-2.0
 *
 * What the copy knows of a disk ahead of where it stands: a hole, or data. It may
 * be outdated, so it only says where to look and how far; see copier.c.
 */
#ifndef VS_COPY_SCOUT_H
#define VS_COPY_SCOUT_H

#include <stdbool.h>
#include <stdint.h>

#include "destination.h"

struct copy_scout {
    const struct destination *destination;
    bool asking, hole;
    uint64_t from, end; /* the range of which it is known */
    uint64_t epoch;     /* of the mirror for which it was asked */
    struct disk_io io;
};

void copy_scout_init(struct copy_scout *s, const struct destination *destination);
void copy_scout_forget(struct copy_scout *s);
/* Whether it is known what the disk has at offset; else it is asked (up to end). */
bool copy_scout_knows(struct copy_scout *s, struct vs_disk *disk, uint64_t offset, uint64_t end);
/* What the disk has answered to somebody else. */
void copy_scout_learn(struct copy_scout *s, const struct disk_io *found);

#endif
