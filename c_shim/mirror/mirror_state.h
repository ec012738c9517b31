/* SPDX-License-Identifier: Apache-2.0
 *
 * The state of the mirror and its moves, all of which stand in one table (mirror_state.c):
 *
 *   passthrough, degraded --start--> syncing --copied, flushed--> steady
 *   syncing, steady --congestion--> ahead --catch up--> syncing (pull_ahead.c)
 *   syncing, steady, ahead --lost--> degraded
 *   any but passthrough --stop--> passthrough
 *   steady --switch--> passthrough, or steady (kept)
 *
 * Policy (when to attach, to retry, to switch) is the control plane's.
 */
#ifndef VS_MIRROR_STATE_H
#define VS_MIRROR_STATE_H

#include <stdbool.h>
#include <stdint.h>

#include "shim.h"

struct bad_ranges;
struct mailbox;
struct mirror_listener;

enum record { RECORD_WRITTEN, RECORD_PENDING, RECORD_FAILED };

/* Whether the guest's writes are captured. The epoch changes whenever that ends: what was captured before finds that
 * out when it completes, and moves no count. */
struct capture {
    bool on; /* in syncing and steady */
    uint64_t epoch;
    unsigned captured, uncaptured; /* writes in flight on the source */
};

/* on_destination_error=pause: a steady destination was lost, and none has become steady since. Whoever waits for
 * durability waits on, in whatever state (guest_flush.c). */
struct pause {
    bool on;
    uint64_t since_ns, released;
};

struct mirror_state {
    enum vs_mirror_state now;
    struct capture capture;
    bool consistent;    /* the destination holds a moment of the source: since steady, until it is copied to again */
    bool differs;       /* found by a verification (from then on); nothing but the control plane knows when that ends */
    enum record record; /* pending: flushes are held until the state record says "outdated" */
    struct pause pause;
    /* Syncing, and all is copied: flushes asked for from now on wait for steady. Up to flush request "joining_request"
     * they may have been confirmed by the source alone, so that steady has to begin with a prefix that holds it. */
    bool joining;
    uint64_t joining_request;
    bool durability_changed; /* guest_flush_pump() decides anew */
    struct vs_counts *counts;
    struct bad_ranges *bad;
    struct mirror_listener *listener;
    struct mailbox *mailbox;
};

/* The one place where the state changes. Tells the control plane; a move that is not in the table is a defect.
 * The counts begin before a move to steady (counts_enter_steady), and end here. */
void mirror_move(struct mirror_state *s, enum vs_mirror_event event, uint32_t reason, int error);
void mirror_pause(struct mirror_state *s, bool on, uint64_t now_ns);
/* The control plane has written the state record, or could not. */
void mirror_record_written(struct mirror_state *s, bool failed);

/* Something has changed that may let those go who wait for durability. */
static inline void durability_recheck(struct mirror_state *s)
{
    s->durability_changed = true;
}

#endif
