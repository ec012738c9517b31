/* SPDX-License-Identifier: Apache-2.0
 *
 * The activity log: which extents of the disk may have bits in the bitmap that
 * are not durable yet. Bounded, so that a host crash costs at most so many
 * extents copied again. See activity_log.c.
 */
#ifndef VS_ACTIVITY_LOG_H
#define VS_ACTIVITY_LOG_H

#include <stdbool.h>
#include <stdint.h>

#include "list.h"
#include "uring.h"

struct mailbox;
struct vs_bitmap;

enum activity_step { ACTIVITY_IDLE, ACTIVITY_SYNC_BITS, ACTIVITY_WRITE, ACTIVITY_SYNC_LOG };
enum extent_state { EXTENT_FREE, EXTENT_COMING, EXTENT_ACTIVE, EXTENT_LEAVING };

struct active_extent {
    struct list link; /* in "active", the least recently used first; or in "idle" (free) */
    uint64_t extent;
    uint32_t writes; /* on their way in it */
    enum extent_state state;
};

/* A range that must not be written to before its extents are active. */
struct activity_wait {
    struct list link;
    uint64_t offset, length;
    uint64_t claimed; /* extents that a transaction holds for it while it is put together */
    void (*entered)(struct activity_wait *w);
};

struct activity {
    struct uring *uring;
    struct mailbox *mailbox;  /* told of a failure */
    struct vs_bitmap *bitmap; /* NULL: there is none (any more) */
    struct active_extent *slots;
    uint32_t *slot_of; /* by extent; 0: none, else slot number + 1 */
    struct list active, idle;
    struct list waiting; /* struct activity_wait, in the order in which they came */
    enum activity_step step;
    bool failed; /* told; waits until the control plane has made the bitmap void */
    struct uring_op op;
    unsigned in_flight;
    uint8_t *buffer;  /* the copy of the log under way */
    uint64_t written; /* of it */
    uint64_t syncs;   /* metadata flushes so far */
};

/* b: NULL, or a bitmap's file that is open. */
int activity_init(struct activity *a, struct vs_bitmap *b, struct uring *uring, struct mailbox *mailbox);
void activity_free(struct activity *a);
/* What is marked as different is in the file too, or there is none that a restart would believe. */
bool activity_tracks(const struct activity *a);
/* True: go on at once. False: w->entered() is called when its extents are active. */
bool activity_enter(struct activity *a, struct activity_wait *w, uint64_t offset, uint64_t length);
/* The disk has grown. 0 or -ENOMEM. */
int activity_grow(struct activity *a, uint64_t capacity_bytes);
/* The write is over. */
void activity_leave(struct activity *a, uint64_t offset, uint64_t length);
void activity_pump(struct activity *a);
/* The control plane has recorded that the bitmap is void: go on without it, once its map does not follow it any more
 * (dirty_map.stored). Only if there is one, and nothing of it is under way. */
bool activity_may_void(const struct activity *a);
void activity_void(struct activity *a);

#endif
