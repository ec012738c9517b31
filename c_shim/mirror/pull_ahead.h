/* SPDX-License-Identifier: Apache-2.0
 *
 * Ahead of a destination that is too slow: the guest runs on, and the
 * destination catches up later. See pull_ahead.c.
 */
#ifndef VS_PULL_AHEAD_H
#define VS_PULL_AHEAD_H

#include <stdbool.h>
#include <stdint.h>

#include "shim.h"

struct copier;
struct difference;
struct disk_host;
struct guest_load;
struct mailbox;
struct mirror_state;
struct repl_log;
struct replicator;
struct tap;
struct uncopied;
struct verifier;

/* What it needs of other rooms. */
struct pull_ahead_rooms {
    struct mirror_state *state;
    struct tap *tap;
    const struct repl_log *log;
    const struct vs_counts *counts;
    struct difference *difference;
    struct copier *copier;
    const struct replicator *replicator;
    const struct verifier *verifier;
    const struct uncopied *uncopied;
    const struct guest_load *load;
    const struct disk_host *host;
    struct mailbox *mailbox;
};

struct pull_ahead {
    struct pull_ahead_rooms rooms;
    bool enabled; /* else writes wait */
    uint64_t max_lag_ns, first_backoff_ns;
    bool drained;           /* all that was on its way is on the destination, durably */
    bool lag_counts;        /* in steady: the lag was within bounds since */
    unsigned times;         /* that it was pulled ahead without a good while of steady in between */
    uint64_t since_ns;      /* when it was pulled ahead */
    uint64_t generation;    /* G then: the destination gets no later write */
    uint64_t not_before_ns; /* it may not catch up before */
    uint64_t steady_since_ns;
};

void pull_ahead_init(struct pull_ahead *a, const struct pull_ahead_rooms *rooms, const struct vs_engine_config *config);
/* A destination is attached. */
void pull_ahead_reset(struct pull_ahead *a);
/* Whether the log is so short that steady would last. */
bool pull_ahead_may_be_steady(const struct pull_ahead *a);
void pull_ahead_steady(struct pull_ahead *a);
void pull_ahead_pump(struct pull_ahead *a);
uint64_t pull_ahead_deadline_ns(const struct pull_ahead *a);
/* Begins to copy what differs. -ENOTCONN (not ahead), -EBUSY (what was in the log is not durable there yet, or
 * the state record is not written) or -EAGAIN (too early). */
int pull_ahead_catch_up(struct pull_ahead *a);

struct lag {
    uint64_t bytes, writes, ns;
};
/* How far the destination is behind. */
struct lag pull_ahead_lag(const struct pull_ahead *a);

#endif
