/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine: all state of the data plane, and which file may change what.
 *
 * One thread runs it (engine.c) and alone touches everything here but the
 * mailbox, which its lock guards. A pass of the loop: reap completions, apply
 * commands, take up requests, show the guest what is done, then replicate,
 * copy and flush. Nothing blocks but the wait at the top.
 */
#ifndef VS_ENGINE_STATE_H
#define VS_ENGINE_STATE_H

#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stdint.h>

#include "activity_log.h"
#include "clock.h"
#include "disk.h"
#include "guest.h"
#include "heartbeat.h"
#include "bounds.h"
#include "mailbox.h"
#include "mirror.h"
#include "uring.h"

/* An exchange that waits for the gate to close. */
struct waiting_exchange {
    uint64_t token; /* 0: none does */
    struct vs_exchange what;
};

enum gate { GATE_OPEN, GATE_CLOSING, GATE_CLOSED };

struct vs_engine {
    struct vs_engine_config config;
    struct uring uring;
    struct clock_gaps clock_gaps;
    struct disk_host host;
    struct mailbox mailbox;
    pthread_t thread;
    sem_t ended; /* posted when the thread has wound up */
    bool quit;
    /* The device, which outlives its attachments. */
    struct guest guest;
    struct mirror mirror;
    struct activity activity;
    struct heartbeat heartbeat;
    enum gate gate;
    uint64_t gate_token, gate_closed_ns, gate_deadline_ns;
    struct waiting_exchange exchange;
    /* What is shown. */
    uint64_t wakeups;
};

static inline uint64_t engine_now(const struct vs_engine *e)
{
    return e->host.now_ns;
}

#endif
