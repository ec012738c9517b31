/* SPDX-License-Identifier: Apache-2.0
 *
 * From the log to the destination: entries are taken in their order, merged
 * with the next ones while these continue where they end, and written with many
 * in flight. Overlapping ones wait for each other in the destination's range
 * slots, so that the last write of each byte is the last in the order.
 */
#ifndef VS_REPLICATOR_H
#define VS_REPLICATOR_H

#include <stdbool.h>
#include <stdint.h>

#include "destination.h"
#include "bounds.h"
#include "list.h"
#include "range_slots.h"

struct mirror_listener;
struct mirror_state;
struct repl_log;
struct throttle;
struct uncopied;

struct replica {
    struct list link; /* free, or in use */
    struct replicator *replicator;
    bool submitted;
    uint64_t first; /* place in the order */
    unsigned count; /* entries */
    struct range_slot slot;
    struct destination_io io;
    struct iovec iov[REPLICA_IOV_MAX];
};

/* What it needs of other rooms. */
struct replicator_rooms {
    struct destination *destination;
    struct repl_log *log;
    struct vs_counts *counts;
    struct mirror_state *state;
    struct throttle *throttle; /* learns how fast the destination drains */
    const struct uncopied *uncopied;
    struct mirror_listener *listener;
    struct disk_host *host;
};

struct replicator {
    struct replicator_rooms rooms;
    struct replica *replicas;
    struct list free, used;
    unsigned in_use;
};

int replicator_init(struct replicator *r, const struct replicator_rooms *rooms);
void replicator_free(struct replicator *r);
void replicator_pump(struct replicator *r);
/* The destination is given up: forgets what was not submitted to it. */
void replicator_drop(struct replicator *r);

#endif
