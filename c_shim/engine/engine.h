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
#include "blk_request.h"
#include "clock.h"
#include "dirty_log.h"
#include "disk.h"
#include "guest_memory.h"
#include "heartbeat.h"
#include "inflight.h"
#include "limits.h"
#include "list.h"
#include "mailbox.h"
#include "mirror.h"
#include "poller.h"
#include "read_fallback.h"
#include "source_failover.h"
#include "switching.h"
#include "uring.h"
#include "virtqueue.h"

/* A request's states are told in request_path.c. */
struct request {
    struct list link; /* free; or kept back after an error of the source (read_fallback.c, source_failover.c) */
    struct vs_engine *engine;
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
    struct mirror mirror;
    struct mirror_listener listener; /* of it, on the guest's side (request_path.c) */
    struct guest_load load;
    struct ring_alloc bounce;
    struct activity activity;
    struct heartbeat heartbeat;
    struct read_fallback read_fallback;
    struct source_failover failover;
    unsigned taken_in_pass; /* requests */
    enum gate gate;
    uint64_t gate_token, gate_closed_ns, gate_deadline_ns;
    struct waiting_exchange exchange;
    struct frontends frontends;
    struct poller poller;
    bool room; /* something was given back that a stalled queue may wait for */
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

#endif
