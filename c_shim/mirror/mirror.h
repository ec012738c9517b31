/* SPDX-License-Identifier: Apache-2.0
 *
 * The mirror as the data path knows it: its state and the moves between
 * states. Policy (when to attach, to retry, to switch) is the control plane's.
 *
 *   passthrough --start--> syncing --copied, flushed--> steady
 *   syncing, steady --congestion--> ahead --catch up--> syncing (pull_ahead.c)
 *   syncing, steady, ahead --failure, timeout--> degraded --start--> syncing
 *   any --stop--> passthrough
 *   steady --exchange--> steady (kept) or passthrough
 *
 * With on_destination_error=pause the guest's flushes wait from a failure in steady
 * on, until steady is reached again or somebody says stop.
 *
 * "capture_epoch" changes whenever capture ends: what was captured before finds that
 * out when it completes, and moves no count. So also when the guest gets ahead of a
 * destination that stays; when one is given up, its epoch changes too (destination.h).
 */
#ifndef VS_MIRROR_H
#define VS_MIRROR_H

#include <stdbool.h>
#include <stdint.h>

#include "destination.h"

enum record { RECORD_WRITTEN, RECORD_PENDING, RECORD_FAILED };

struct mirror {
    enum vs_mirror_state state;
    unsigned left_sources; /* that are being closed, after a switch */
    uint64_t capture_epoch;
    bool capturing;     /* in syncing and steady */
    enum record record; /* pending: flushes are held until the state record says "outdated" */
    unsigned captured_writes, uncaptured_writes; /* writes in flight on the source */
    /* Syncing, and all is copied: flushes asked for from now on wait for steady. Up to flush request "joining_request"
     * they may have been confirmed by the source alone, so that steady has to begin with a prefix that holds it. */
    bool joining;
    uint64_t joining_request;
    struct destination_io steady_flush; /* the flush that makes it steady */
    bool steady_flush_in_flight;
    uint64_t steady_prefix; /* what was on the destination when it began */
    uint64_t steady_capture_epoch;
    /* on_destination_error=pause: a steady destination was lost, and none has become steady since. Whoever waits for
     * durability waits on, in whatever state (guest_flush.c). */
    bool differs; /* found by a verification (from then on); nothing but the control plane knows when that ends */
    bool paused;
    uint64_t paused_since_ns, pause_released;
};

void mirror_init(struct vs_engine *e);
/* flags: enum vs_start_flags. 0, -EBUSY (there is one, a former one is not over, or its end is not recorded), -ENOSPC
 * (smaller than the guest's disk) or -EINVAL (its block is larger than the guest's; no peer is tracked).
 * Owns the disk on success. */
int mirror_start(struct vs_engine *e, vs_disk *disk, uint32_t flags);
void mirror_stop(struct vs_engine *e, uint32_t reason);
/* The destination is lost; the guest is not to notice. */
void mirror_degrade(struct vs_engine *e, uint32_t reason, int error);
/* What is at the source, or in a ring, is not captured any more, and waits for no room in the log. */
void mirror_stop_capture(struct vs_engine *e);
void mirror_set_state(struct vs_engine *e, enum vs_mirror_state state, uint32_t reason, int error);
/* An event that tells the state. */
void mirror_post(struct vs_engine *e, uint32_t kind, uint32_t reason, int error);
/* Steps that depend on what has completed: steady, timeouts, the end of a former destination. */
void mirror_pump(struct vs_engine *e);
/* flags: enum vs_exchange_flags. -ENOTCONN, -EBUSY (a range in doubt or unreadable, or not gated) or 0. */
int mirror_exchange(struct vs_engine *e, uint32_t flags);
/* When mirror_pump() has to look again without any completion; UINT64_MAX: never. */
uint64_t mirror_deadline_ns(const struct vs_engine *e);

#endif
