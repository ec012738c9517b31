/* SPDX-License-Identifier: Apache-2.0
 *
 * Ahead of a destination that is too slow: the guest runs on, and the
 * destination catches up later. See pull_ahead.c.
 */
#ifndef VS_PULL_AHEAD_H
#define VS_PULL_AHEAD_H

#include <stdbool.h>
#include <stdint.h>

struct vs_engine;

struct pull_ahead {
    bool consistent;          /* it was steady: what the log still brings it is a moment of the source */
    bool drained;             /* and all that is on the destination, durably */
    bool lag_counts;          /* in steady: the lag was within bounds since */
    unsigned times;           /* that it was pulled ahead without a good while of steady in between */
    uint64_t since_ns;        /* when it was pulled ahead */
    uint64_t generation;      /* G then: the destination gets no later write */
    uint64_t bytes;           /* written since */
    uint64_t not_before_ns;   /* it may not catch up before */
    uint64_t steady_since_ns;
};

/* A destination is attached. */
void pull_ahead_reset(struct vs_engine *e);
/* Whether the log is so short that steady would last. */
bool pull_ahead_may_be_steady(const struct vs_engine *e);
void pull_ahead_steady(struct vs_engine *e);
/* Whether a write has to wait for room in the log: 0, or (UINT64_MAX) until pull_ahead_pump() has looked at it. */
uint64_t pull_ahead_wait_ns(const struct vs_engine *e);
/* The log is filling: no new region copies. */
bool pull_ahead_log_fills(const struct vs_engine *e);
void pull_ahead_pump(struct vs_engine *e);
uint64_t pull_ahead_deadline_ns(const struct vs_engine *e);
/* Begins to copy what differs. -ENOTCONN (not ahead), -EBUSY (what was in the log is not durable there yet, or
 * the state record is not written) or -EAGAIN (too early). */
int pull_ahead_catch_up(struct vs_engine *e);

struct lag {
    uint64_t bytes, writes, ns;
};
/* How far the destination is behind. */
struct lag pull_ahead_lag(const struct vs_engine *e);

#endif
