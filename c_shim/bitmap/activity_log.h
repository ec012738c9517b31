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

struct vs_engine;
struct vs_bitmap;

/* ---- as it lies in the file ---- */

struct activity_list {
    uint32_t count;
    uint64_t *extent; /* the caller frees it */
};

/* Bytes of one copy. */
uint64_t activity_log_bytes(uint32_t extents);
/* What the newest whole copy says (0), -EUCLEAN: none is whole; or another negative errno. Sets bitmap's sequence. */
int activity_log_read(int fd, struct vs_bitmap *bitmap, struct activity_list *out);
/* The sequence alone: what it says does not matter. */
int activity_log_sequence(int fd, struct vs_bitmap *bitmap);
/* Both copies empty. */
int activity_log_clear(int fd, struct vs_bitmap *bitmap);

/* ---- at work ---- */

enum activity_step { ACTIVITY_IDLE, ACTIVITY_SYNC_BITS, ACTIVITY_WRITE, ACTIVITY_SYNC_LOG };
enum extent_state { EXTENT_FREE, EXTENT_COMING, EXTENT_ACTIVE, EXTENT_LEAVING };

struct active_extent {
    struct list link;      /* in "active", the least recently used first; or in "idle" (free) */
    uint64_t extent;
    uint32_t writes;       /* on their way in it */
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
    struct vs_bitmap *bitmap;   /* NULL: there is none (any more) */
    struct active_extent *slots;
    uint32_t *slot_of;          /* by extent; 0: none, else slot number + 1 */
    struct list active, idle;
    struct list waiting;        /* struct activity_wait, in the order in which they came */
    enum activity_step step;
    bool failed;                /* told; waits until the control plane has made the bitmap void */
    struct uring_op op;
    unsigned in_flight;
    uint8_t *buffer;            /* the copy of the log under way */
    uint64_t written;           /* of it */
    uint64_t syncs;             /* metadata flushes so far */
};

int activity_init(struct vs_engine *e);
void activity_free(struct vs_engine *e);
/* What is marked as different is in the file too, or there is none that a restart would believe. */
bool activity_tracks(const struct vs_engine *e);
/* True: go on at once. False: w->entered() is called when its extents are active. */
bool activity_enter(struct vs_engine *e, struct activity_wait *w, uint64_t offset, uint64_t length);
/* The disk has grown. 0 or -ENOMEM. */
int activity_grow(struct vs_engine *e, uint64_t capacity_bytes);
/* The write is over. */
void activity_leave(struct vs_engine *e, uint64_t offset, uint64_t length);
void activity_pump(struct vs_engine *e);
/* The control plane has recorded that the bitmap is void: go on without it. */
void activity_void(struct vs_engine *e);

#endif
