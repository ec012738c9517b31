/* SPDX-License-Identifier: Apache-2.0
 *
 * The mirror: its rooms, and what concerns several of them: a destination comes, becomes steady, goes, or changes
 * places with the source. Its states and moves are in mirror_state.h.
 */
#ifndef VS_MIRROR_H
#define VS_MIRROR_H

#include <stdbool.h>
#include <stdint.h>

#include "bad_ranges.h"
#include "copier.h"
#include "counts.h"
#include "destination.h"
#include "difference.h"
#include "grow.h"
#include "guest_flush.h"
#include "guest_side.h"
#include "idle_probe.h"
#include "mirror_state.h"
#include "pull_ahead.h"
#include "repl_log.h"
#include "replicator.h"
#include "source.h"
#include "tap.h"
#include "uncopied.h"
#include "verifier.h"

/* The flush that makes it steady. */
struct steady_flush {
    struct destination_io io;
    bool in_flight;
    uint64_t prefix; /* what was on the destination when it began */
    uint64_t capture_epoch;
};

/* What the mirror has from the engine. */
struct mirror_host {
    struct disk_host *disks;
    struct mailbox *mailbox;
    struct activity *activity;
    struct mirror_listener *listener;
    const struct guest_load *load;
    uint64_t *request_limit_bytes; /* the capacity that requests are checked against */
};

struct mirror {
    struct mirror_host given;
    uint64_t timeout_ns; /* of the destination */
    bool pauses;         /* on_destination_error=pause */
    struct source source;
    struct destination destination;
    struct mirror_state state;
    struct vs_counts counts;
    struct repl_log log;
    struct bad_ranges bad;
    struct uncopied uncopied;
    struct tap tap;
    struct difference difference;
    struct replicator replicator;
    struct guest_flush flush;
    struct copier copier;
    struct verifier verifier;
    struct pull_ahead ahead;
    struct grow grow;
    struct idle_probe probe;
    struct steady_flush steady;
    unsigned left_sources; /* that are being closed, after a switch */
};

/* Of a mirror that is all zero. The source is given later (mirror_set_source). 0 or a negative errno. */
int mirror_init(struct mirror *m, const struct mirror_host *host, const struct vs_engine_config *config);
void mirror_free(struct mirror *m);
void mirror_set_source(struct mirror *m, vs_disk *source);
/* flags: enum vs_start_flags. 0, -EBUSY (there is one, a former one is not over, or its end is not recorded, or a
 * switch holds the guest), -ENOSPC (smaller than the guest's disk) or -EINVAL (its block is larger than the guest's; no
 * peer is tracked). Owns the disk on success. */
int mirror_start(struct mirror *m, vs_disk *disk, uint32_t flags);
void mirror_stop(struct mirror *m, uint32_t reason);
/* The destination is lost; the guest is not to notice. */
void mirror_degrade(struct mirror *m, uint32_t reason, int error);
/* The same for those of a group: 0, or -ENOTCONN where it is not steady. */
int mirror_leave(struct mirror *m);
/* Steps that depend on what has completed: steady, timeouts, the end of a former destination. */
void mirror_pump(struct mirror *m);
/* flags: enum vs_exchange_flags. gated: nothing of the guest's is in flight but what a source has failed. -ENOTCONN,
 * -EBUSY (a range in doubt or unreadable, or not gated), -EBADE or 0. */
int mirror_exchange(struct mirror *m, uint32_t flags, bool gated);
/* When mirror_pump() has to look again without any completion; UINT64_MAX: never. */
uint64_t mirror_deadline_ns(const struct mirror *m);
/* The end, and its disks do not answer: those with something in flight that can be cut off are. False: there are
 * none. */
bool mirror_cut_off(struct mirror *m);
/* To which roles (1 << VS_SOURCE, 1 << VS_DESTINATION) changes were sent and never answered. */
uint32_t mirror_unanswered(const struct mirror *m);
/* Nothing is in flight to any of its disks. */
bool mirror_is_idle(const struct mirror *m);
/* The bitmap's file does not follow what differs any more. */
void mirror_leave_bitmap(struct mirror *m);

#endif
