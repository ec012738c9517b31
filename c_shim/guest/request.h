/* SPDX-License-Identifier: Apache-2.0
 *
 * A request of the guest: where it comes from (a pool), and how it ends (an answer in its ring). Its way in between is
 * in request_path.c.
 */
#ifndef VS_REQUEST_H
#define VS_REQUEST_H

#include <stdbool.h>
#include <stdint.h>

#include "activity_log.h"
#include "blk_request.h"
#include "disk.h"
#include "guest.h"
#include "guest_flush.h"
#include "list.h"
#include "range_slots.h"
#include "tap.h"

/* A request's states are told in request_path.c. */
struct request {
    struct list link; /* free; or kept back after an error of the source (read_fallback.c, source_failover.c) */
    struct guest *guest;
    struct queue *queue;
    struct mem_table *table; /* pinned; NULL: not in flight */
    uint16_t head;
    bool write_through; /* latched at pop */
    uint64_t taken_ns;
    uint64_t generation;     /* once the source has completed it; of a read: what the destination must hold */
    uint64_t waits_since_ns; /* for the destination */
    int parked_error;        /* why it is parked; 0: others are */
    struct mirrored_write write;
    uint8_t *bounce;
    int64_t bounce_slot;
    struct iovec buffer_iov; /* one segment: the log's or the bounce buffer */
    struct range_slot slot;
    struct disk_io io;
    struct flush_waiter flush;
    struct activity_wait activity;
    bool in_extents;        /* it has entered the activity log */
    struct blk_request blk; /* last: the iovec array is large and mostly cold */
};

/* 0 or -ENOMEM. */
int requests_init(struct guest *g);
/* What still waits for durability is not answered: the guest has no promise, and will ask again. */
void requests_free(struct guest *g);
/* A free one, which is taken by removing its link; NULL: there is none. */
struct request *request_spare(struct guest *g);

/* A buffer of our own, where the guest's does not suit direct I/O; false: not now. */
bool request_take_bounce(struct request *r);
void request_give_bounce(struct request *r);

/* The guest is answered, and the request is free. */
void request_finish(struct request *r, uint8_t status);
/* A read, with these bytes; NULL: with an error. */
void request_answer_read(struct request *r, const uint8_t *from);

/* Of the disk, not of the guest's memory or of our own doing. */
bool error_is_of_disk(int error);

#endif
