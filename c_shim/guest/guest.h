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
#include "destination.h"
#include "limited_rings.h"
#include "bounds.h"
#include "list.h"
#include "mirror.h"
#include "poller.h"
#include "ring_alloc.h"

struct guest;
struct request; /* request.h */

/* A read of the destination. It may outlive its request, which does not wait for a destination that hangs. */
struct fallback_read {
    struct guest *guest;
    struct request *request; /* NULL: free, or its request is answered */
    bool in_use;
    int64_t slot;
    uint8_t *buffer;
    struct iovec iov;
    struct destination_io io;
};

/* See read_fallback.c. */
struct read_fallback {
    struct list waiting; /* requests, until the destination holds what they may see */
    struct ring_alloc buffers;
    struct fallback_read reads[FALLBACK_DEPTH];
    unsigned in_use;
    uint64_t answered;   /* reads, so far */
    uint64_t told_epoch; /* of the mirror: that it happens was told */
};

/* See source_failover.c. */
struct source_failover {
    bool pending;          /* from the first failure until the exchange, or until it is given up */
    struct list parked;    /* requests, in the order in which they came */
    int flush_error;       /* a source flush has failed; 0: none has */
    uint64_t flush_number; /* guest_flush.source_number of it */
    uint64_t count;        /* exchanges that have ended one */
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
    struct limited_rings limited;
    struct read_fallback read_fallback;
    struct source_failover failover;
    struct ring_alloc bounce;
    bool room;                /* something was given back that a stalled queue may wait for */
    bool ends;                /* the engine does: nothing is answered any more (request_finish) */
    unsigned taken_in_pass;   /* requests */
    struct request *requests; /* REQUEST_SLOTS, of which so many were ever used */
    unsigned requests_made;
    struct list free_requests;
};

/* No request is taken up until the reason is gone; then those that have waited have their turn. */
static inline void guest_hold(struct guest *g, enum guest_hold reason)
{
    g->load.holds |= reason;
}

/* From now on nothing is answered. */
static inline void guest_answers_end(struct guest *g)
{
    g->ends = true;
}

static inline void guest_release(struct guest *g, enum guest_hold reason)
{
    g->load.holds &= ~(unsigned)reason;
    queues_retry(&g->frontends);
}

#endif
