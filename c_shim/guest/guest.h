/* SPDX-License-Identifier: Apache-2.0
 *
 * The guest's side: its requests, and the frontends that it comes through. The
 * engine puts it together; request_path.c is where to begin.
 */
#ifndef VS_GUEST_H
#define VS_GUEST_H

#include <stdbool.h>
#include <stdint.h>

#include "activity_log.h"
#include "attachment.h"
#include "blk_request.h"
#include "mirror.h"
#include "poller.h"
#include "read_fallback.h"
#include "ring_alloc.h"
#include "source_failover.h"

/* A request's states are told in request_path.c. */
struct request {
    struct list link; /* free; or kept back after an error of the source (read_fallback.c, source_failover.c) */
    struct guest *guest;
    struct queue *queue;
    struct mem_table *table; /* pinned; NULL: not in flight */
    uint16_t head;
    bool write_through;     /* latched at pop */
    uint64_t taken_ns;
    uint64_t generation;    /* once the source has completed it; of a read: what the destination must hold */
    uint64_t waits_since_ns; /* for the destination */
    int parked_error;       /* why it is parked; 0: others are */
    struct mirrored_write write;
    uint8_t *bounce;
    int64_t bounce_slot;
    struct iovec buffer_iov; /* one segment: the log's or the bounce buffer */
    struct range_slot slot;
    struct disk_io io;
    struct flush_waiter flush;
    struct activity_wait activity;
    bool in_extents; /* it has entered the activity log */
    struct blk_request blk; /* last: the iovec array is large and mostly cold */
};

struct guest {
    /* The engine's. */
    const struct vs_engine_config *config;
    struct disk_host *host;
    struct mailbox *mailbox;
    struct mirror *mirror;
    struct activity *activity;
    /* Its own. */
    struct blk_limits limits;
    struct mirror_listener listener; /* of the mirror (request_path.c) */
    struct guest_load load;
    struct frontends frontends;
    struct poller poller;
    struct read_fallback read_fallback;
    struct source_failover failover;
    struct ring_alloc bounce;
    bool room;              /* something was given back that a stalled queue may wait for */
    unsigned taken_in_pass; /* requests */
    struct request *requests; /* REQUEST_SLOTS, of which so many were ever used */
    unsigned requests_made;
    struct list free_requests;
};

#endif
