/* SPDX-License-Identifier: Apache-2.0
 *
 * The replication log: what the guest wrote, in the order in which the source
 * completed it, until the destination has it.
 *
 * An entry is reserved before its request is popped (so there is always room
 * for what was taken up), filled by capture, and takes its place in the order
 * (a generation) when the source has completed the write. It is released when
 * it is mirrored. Invariant: the order holds exactly the generations above
 * "mirrored" that have an entry; they ascend.
 */
#ifndef VS_REPL_LOG_H
#define VS_REPL_LOG_H

#include <stdbool.h>
#include <stdint.h>

#include "ring_alloc.h"

enum log_kind { LOG_WRITE, LOG_ZERO };

struct log_entry {
    uint64_t offset, length; /* on the disk, bytes */
    uint64_t generation;     /* 0: not in the order (yet) */
    uint64_t completed_ns;   /* when the source had it */
    uint8_t *data;           /* LOG_WRITE: the captured bytes */
    uint8_t kind;            /* enum log_kind */
    bool may_unmap;
    bool mirrored;
    int64_t slot;
};

struct repl_log {
    struct ring_alloc ring;
    struct log_entry *entries; /* by slot modulo ring.slot_count */
    struct log_entry **order;  /* by place modulo ring.slot_count */
    uint64_t order_head;       /* free-running: the next place */
    uint64_t order_next;       /* the next to hand to the replicator */
    uint64_t order_tail;       /* the oldest not mirrored */
    uint64_t lag_bytes;        /* of entries in the order that are not mirrored */
};

int repl_log_init(struct repl_log *log, uint64_t bytes);
void repl_log_free(struct repl_log *log);

/* NULL: no room now. */
struct log_entry *log_reserve(struct repl_log *log, enum log_kind kind, uint64_t offset, uint64_t length);
/* Gives up an entry that is not in the order. */
void log_abandon(struct repl_log *log, struct log_entry *e);
/* The source has completed it. */
void log_append(struct repl_log *log, struct log_entry *e, uint64_t generation, uint64_t now_ns);
/* The next in the order for the replicator, or NULL. */
struct log_entry *log_peek(struct repl_log *log);
static inline void log_take(struct repl_log *log)
{
    log->order_next++;
}
/* The destination has it. */
void log_mirrored(struct repl_log *log, struct log_entry *e);
/* Generations 1 .. this are on the destination, given that "generation" is the newest there is. */
uint64_t log_mirrored_prefix(const struct repl_log *log, uint64_t generation);
/* Forgets all that was not handed to the replicator (the destination is gone). */
void log_drop_untaken(struct repl_log *log);

static inline uint64_t log_lag_writes(const struct repl_log *log)
{
    return log->order_head - log->order_tail;
}
static inline bool log_drained(const struct repl_log *log)
{
    return log->order_head == log->order_tail;
}
/* When the oldest write that is not mirrored was completed on the source; 0: there is none. */
uint64_t log_oldest_ns(const struct repl_log *log);

#endif
