/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine: all state of the data plane, and which file may change what.
 *
 * One thread runs it (engine.c) and alone touches everything here but the
 * mailbox, which its lock guards. A pass of the loop: reap completions, apply
 * commands, take up requests, show the guest what is done, then replicate,
 * copy and flush. Nothing blocks but the wait at the top.
 */
#ifndef VS_ENGINE_H
#define VS_ENGINE_H

#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stdint.h>

#include "activity_log.h"
#include "attachment.h"
#include "bad_ranges.h"
#include "blk_request.h"
#include "clock.h"
#include "copier.h"
#include "counts.h"
#include "destination.h"
#include "difference.h"
#include "dirty_log.h"
#include "dirty_map.h"
#include "disk.h"
#include "grow.h"
#include "range_set.h"
#include "guest_flush.h"
#include "guest_memory.h"
#include "heartbeat.h"
#include "inflight.h"
#include "limits.h"
#include "list.h"
#include "mailbox.h"
#include "mirror.h"
#include "poller.h"
#include "pull_ahead.h"
#include "range_slots.h"
#include "read_fallback.h"
#include "repl_log.h"
#include "replicator.h"
#include "source_failover.h"
#include "switching.h"
#include "throttle.h"
#include "uring.h"
#include "verifier.h"
#include "virtqueue.h"

/* A request's states are told in request_path.c. */
struct request {
    struct list link; /* free; or kept back after an error of the source (read_fallback.c, source_failover.c) */
    struct vs_engine *engine;
    struct queue *queue;
    struct mem_table *table; /* pinned; NULL: not in flight */
    uint16_t head;
    bool write_through;     /* latched at pop */
    bool captured;          /* counted in mirror.captured_writes (else uncaptured_writes) */
    uint64_t capture_epoch; /* of the mirror for which it was captured */
    uint64_t taken_ns;
    uint64_t generation;    /* once the source has completed it; of a read: what the destination must hold */
    uint64_t waits_since_ns; /* for the destination */
    int parked_error;       /* why it is parked; 0: others are */
    struct log_entry *entry;
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

enum gate { GATE_OPEN, GATE_CLOSING, GATE_CLOSED };

struct vs_engine {
    struct vs_engine_config config;
    struct blk_limits limits;
    struct uring uring;
    struct clock_gaps clock_gaps;
    struct disk_host host;
    struct mailbox mailbox;
    pthread_t thread;
    sem_t ended; /* posted when the thread has wound up */
    bool quit;
    /* The device, which outlives its attachments. */
    vs_disk *source;
    struct vs_counts counts;
    struct range_slots source_slots;
    struct repl_log log;
    struct ring_alloc bounce;
    struct bad_ranges bad;
    struct throttle throttle;
    struct guest_flush flush;
    struct destination destination;
    struct mirror mirror;
    struct replicator replicator;
    struct copier copier;
    struct dirty_map to_copy; /* regions that this copy has still to do */
    struct difference difference;
    struct activity activity;
    struct heartbeat heartbeat;
    struct verifier verifier;
    struct grow grow;
    struct pull_ahead ahead;
    struct read_fallback read_fallback;
    struct source_failover failover;
    unsigned taken_in_pass; /* requests */
    enum gate gate;
    uint64_t gate_token, gate_closed_ns, gate_deadline_ns;
    struct waiting_exchange exchange;
    unsigned requests_in_flight;
    uint64_t last_taken_ns; /* when a request was last taken up */
    struct frontends frontends;
    struct poller poller;
    bool room; /* something was given back that a stalled queue may wait for */
    uint64_t throttle_until_ns; /* stalled writes may be tried again then; 0: nothing waits for time */
    uint64_t throttled_since_ns, throttled_ns;
    struct request *requests; /* REQUEST_SLOTS, of which so many were ever used */
    unsigned requests_made;
    struct list free_requests;
    /* What is shown. */
    uint64_t wakeups;
};

static inline uint64_t engine_now(const struct vs_engine *e)
{
    return e->host.now_ns;
}

/* Between two requests of a guest that has one in flight at a time, none is; and yet it is at work. */
static inline bool engine_took_up_lately(const struct vs_engine *e)
{
    return e->last_taken_ns && engine_now(e) - e->last_taken_ns < GUEST_WORKS_NS;
}

static inline bool engine_guest_works(const struct vs_engine *e)
{
    return e->requests_in_flight || engine_took_up_lately(e);
}

/* Requests are taken up: no switch holds the guest. */
static inline bool engine_takes_up(const struct vs_engine *e)
{
    return e->gate == GATE_OPEN && !e->failover.pending;
}

/* No write waits for room in the log any more: for how long one did is added up. */
static inline void engine_stop_throttling(struct vs_engine *e)
{
    if (e->throttled_since_ns)
        e->throttled_ns += engine_now(e) - e->throttled_since_ns;
    e->throttled_since_ns = 0;
}

#endif
