/* SPDX-License-Identifier: Apache-2.0
 *
 * Which parts ("extents") of the disk may be written at present, as DRBD's
 * activity log has it: a bounded set, whose durable form (bitmap_file.c) tells
 * after a crash of the host where bits may be missing. Pure: no I/O, no time.
 *
 * An extent is absent, coming (named by the copy of the log that is being
 * written) or active (named by a durable one). It is held while writes to it
 * are in flight, and leaves, least recently used first, only when it is not.
 */
#ifndef VS_ACTIVITY_LOG_H
#define VS_ACTIVITY_LOG_H

#include <stdbool.h>
#include <stdint.h>

#include "list.h"

struct activity_slot {
    struct list link;  /* free, or by use: the least recent first */
    struct activity_slot *chain;
    uint64_t extent;
    uint64_t planned;  /* the plan that needs it: stays */
    unsigned writes;   /* in flight */
    bool coming;
};

struct activity_log {
    uint32_t extents_max;
    unsigned extent_shift;
    struct activity_slot *slots;
    struct activity_slot **buckets;
    uint64_t bucket_mask;
    struct list free, used;
    uint64_t plan; /* the number of the one that is made or written */
    unsigned in_use;
};

int activity_log_init(struct activity_log *l, uint32_t extents_max, uint64_t extent_bytes);
void activity_log_free(struct activity_log *l);

/* If every extent of the range is active: holds them all for a write. length > 0. */
bool activity_log_hold(struct activity_log *l, uint64_t offset, uint64_t length);
/* That write is over. */
void activity_log_release(struct activity_log *l, uint64_t offset, uint64_t length);

/* A plan: what the next copy of the log is to name. */
void activity_log_plan(struct activity_log *l);
/* Makes room for this range and lets its extents come; false: there is no room until writes are over, and
 * nothing has changed. *evicted: extents had to leave. */
bool activity_log_add(struct activity_log *l, uint64_t offset, uint64_t length, bool *evicted);
/* All that are active or coming; returns how many. */
uint64_t activity_log_list(const struct activity_log *l, uint64_t *extents);
/* The copy is durable: what was coming is active. */
void activity_log_commit(struct activity_log *l);

#endif
