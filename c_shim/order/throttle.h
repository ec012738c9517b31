/* SPDX-License-Identifier: Apache-2.0
 *
 * How fast the guest may write while the destination lags behind (durability,
 * rule 6): freely while the lag is under half of its bounds (bytes of the log,
 * time), then at a rate that falls from twice what the destination drains to
 * nothing at the bound. It settles at three quarters, where in equals out. Pure.
 */
#ifndef VS_THROTTLE_H
#define VS_THROTTLE_H

#include <stdint.h>

struct throttle {
    uint64_t log_bytes;
    uint64_t max_lag_ns;
    double drain_bytes_per_ns; /* smoothed */
    double credit_bytes;       /* may be negative: what was let in on credit */
    uint64_t window_start_ns;  /* of the measurement of the drain */
    uint64_t window_bytes;
    uint64_t credit_at_ns;
};

void throttle_init(struct throttle *t, uint64_t log_bytes, uint64_t max_lag_ns);
/* The destination has taken so many bytes. */
void throttle_drained(struct throttle *t, uint64_t bytes, uint64_t now_ns);
/* Whether a write may be taken up now: 0, or how long to wait before asking
 * again; UINT64_MAX: until the lag falls. lag_ns 0: there is no bound in time. */
uint64_t throttle_wait_ns(struct throttle *t, uint64_t log_bytes_used, uint64_t lag_ns, uint64_t now_ns);
/* A write of so many bytes was taken up. */
void throttle_admitted(struct throttle *t, uint64_t bytes);

#endif
