/* SPDX-License-Identifier: Apache-2.0
 *
 * How much the guest may do: bytes and requests a second, of reads, writes and both. Pure.
 *
 * Each limit is a bucket. A request that goes fills it by its size (bytes) or by one (requests), and it leaks at the
 * limit's rate. While it holds more than its size, requests wait. So any request may go, however large: those after it
 * wait the longer. Rates, bursts and what counts are those of QEMU's throttling, for one who knows it to find what they
 * expect:
 *
 *   - without a burst a bucket holds a tenth of a second, or every other request of a busy guest would wait;
 *   - with one, what may be done in length_s at the burst's rate, and a second bucket keeps to that rate;
 *   - a request counts as one, or with iops_size as many of that size as it has.
 *
 * A bucket is never emptier than empty: time in which nothing was asked for earns no more than a bucket.
 */
#ifndef VS_RATE_LIMIT_H
#define VS_RATE_LIMIT_H

#include <stdbool.h>
#include <stdint.h>

#include "shim.h"

/* What a rate may be, as in QEMU: a burst as a whole, too. */
#define RATE_MAX 1000000000000000u

struct bucket {
    double rate, size; /* a second; what it holds before requests wait. rate 0: there is no limit */
    double burst_rate; /* 0: a burst is bounded by size alone */
    double level, burst_level;
};

struct rate_limit {
    bool on; /* there is a limit */
    struct bucket bucket[VS_LIMITED_KINDS];
    uint64_t iops_size;
    uint64_t leaked_ns; /* until then all have leaked */
};

bool rate_limit_possible(const struct vs_limits *limits);
/* From now on. What a bucket has of what came before stays, but for what it could not hold: who changes a limit gives
 * nothing away, and makes nobody wait for a rate that holds no more. */
void rate_limit_set(struct rate_limit *l, const struct vs_limits *limits, uint64_t now_ns);
/* 0: a request may go, or for how long it has to wait. */
uint64_t rate_limit_wait_ns(struct rate_limit *l, bool writes, uint64_t now_ns);
/* It goes. */
void rate_limit_charge(struct rate_limit *l, bool writes, uint64_t bytes);

#endif
