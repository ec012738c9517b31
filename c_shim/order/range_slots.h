/* SPDX-License-Identifier: Apache-2.0
 *
 * Overlapping operations take turns, in the order in which they asked. One set
 * serves the source (guest writes in flight), another the destination (replica
 * writes and region copies).
 *
 * Fast path: a small counting filter over chunks of the disk; where all counts
 * of a range are zero nothing can overlap it. Otherwise the set, which is as
 * long as there are operations in flight, is searched.
 */
#ifndef VS_RANGE_SLOTS_H
#define VS_RANGE_SLOTS_H

#include <stdbool.h>
#include <stdint.h>

#include "list.h"

#define RANGE_CHUNK_BYTES (64u << 10)
#define RANGE_FILTER 4096u
/* A range of more chunks than this is not filtered but always compared. */
#define RANGE_WIDE_CHUNKS 32u

struct range_slot {
    struct list link; /* in the order of asking */
    uint64_t start, end;
    bool granted;
    /* Its turn has come; called from range_release(), never from range_take().
     * Must neither take nor give back a slot. */
    void (*grant)(struct range_slot *slot);
};

struct range_slots {
    struct list all;
    unsigned waiting; /* slots not granted */
    unsigned wide;    /* slots outside the filter */
    uint16_t filter[RANGE_FILTER];
};

void range_slots_init(struct range_slots *s);
/* True: granted at once. length > 0. */
bool range_take(struct range_slots *s, struct range_slot *slot, uint64_t offset, uint64_t length);
/* Gives a slot back, granted or not, and grants those that waited for it alone. */
void range_release(struct range_slots *s, struct range_slot *slot);

#endif
