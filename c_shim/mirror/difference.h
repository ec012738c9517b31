/* SPDX-License-Identifier: Apache-2.0
 *
 * Where the two disks may differ (durability, rule 4): what has to be copied
 * again, and nothing else, when a destination comes back. See difference.c.
 */
#ifndef VS_DIFFERENCE_H
#define VS_DIFFERENCE_H

#include <stdbool.h>
#include <stdint.h>

#include "destination.h"
#include "dirty_map.h"
#include "list.h"

struct bad_ranges;
struct mirror_listener;
struct mirror_state;
struct repl_log;
struct source;
struct uncopied;
struct guest_load;
struct vs_bitmap;

enum checkpoint_step {
    CHECKPOINT_NONE,
    CHECKPOINT_MIRRORING, /* the writes that it covers are on their way to the destination */
    CHECKPOINT_FLUSHING,  /* both disks are being flushed */
    CHECKPOINT_SETTLING   /* both have what it covers: its regions are clean but for what came since */
};

/* Who changes the destination beside the log is asked for it when a checkpoint begins. */
struct marker {
    struct list link;
    void (*mark_in_flight)(struct marker *m);
};

/* What it needs of other rooms. */
struct difference_rooms {
    struct destination *destination;
    const struct source *source;
    struct vs_counts *counts;
    const struct repl_log *log;
    struct mirror_state *state;
    const struct uncopied *uncopied;
    const struct bad_ranges *bad;
    struct mirror_listener *listener;
    const struct guest_load *load;
    const struct disk_host *host;
    struct mailbox *mailbox;
};

struct difference {
    struct difference_rooms rooms;
    struct list markers;
    uint64_t interval_ns;
    bool tracked; /* a peer is known: every write marks its region */
    struct dirty_map differs;
    struct dirty_map recent;   /* changed since the checkpoint began (or since the last one) */
    struct dirty_map settling; /* changed before it began */
    enum checkpoint_step step;
    bool more;           /* settling has to go on: call again without waiting */
    uint64_t generation; /* the checkpoint covers the writes up to it */
    uint64_t word;       /* how far it has settled */
    uint64_t next_ns;    /* of the next step that time brings */
    uint64_t epoch;      /* of the mirror, when the flushes began */
    unsigned flushes;    /* of its own, in flight */
    bool flush_failed;
    uint64_t source_generation, destination_prefix; /* G and M when they began */
    struct disk_io source_io;
    struct destination_io destination_io;
};

/* bitmap: NULL, or what an earlier process has left of a peer if peer_tracked; and the file follows from here on. */
int difference_init(struct difference *d, const struct difference_rooms *rooms, const struct vs_engine_config *config);
void difference_add_marker(struct difference *d, struct marker *m);
void difference_free(struct difference *d);

/* Before a write of this range is submitted to the source, or a region copy to the destination. */
void difference_mark(struct difference *d, uint64_t offset, uint64_t length);
/* A destination is attached: of a new one everything may differ; of the peer that is tracked, what does. */
void difference_attach(struct difference *d, bool resync);
/* No write is captured from here on: a last checkpoint settles what the destination still gets. */
void difference_pull_ahead(struct difference *d);
/* No checkpoint is under way. */
bool difference_at_rest(const struct difference *d);
/* It is given up: what is not settled stays different. */
void difference_detach(struct difference *d);
/* There is no peer any more. */
void difference_forget(struct difference *d);
/* The next checkpoint shall not wait for its time. */
void difference_hurry(struct difference *d);
void difference_pump(struct difference *d);
uint64_t difference_deadline_ns(const struct difference *d);

#endif
