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
#include "limits.h"
#include "list.h"
#include "range_slots.h"
#include "repl_log.h"

struct vs_engine;

struct replica {
    struct list link; /* free, or in use */
    struct vs_engine *engine;
    bool submitted;
    uint64_t first;   /* place in the order */
    unsigned count;   /* entries */
    struct range_slot slot;
    struct destination_io io;
    struct iovec iov[REPLICA_IOV_MAX];
};

struct replicator {
    struct replica *replicas;
    struct list free, used;
    unsigned in_use;
};

int replicator_init(struct vs_engine *e);
void replicator_free(struct vs_engine *e);
void replicator_pump(struct vs_engine *e);
/* The destination is given up: forgets what was not submitted to it. */
void replicator_drop(struct vs_engine *e);

#endif
