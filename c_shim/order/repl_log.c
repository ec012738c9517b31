/* SPDX-License-Identifier: Apache-2.0
 *
 * The replication log: entries are reserved, filled, put in order and released here. See repl_log.h.
 */
#include "repl_log.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bounds.h"

int repl_log_init(struct repl_log *log, uint64_t bytes)
{
    uint64_t slots = bytes / LOG_UNIT_BYTES + LOG_EXTRA_ENTRIES;
    memset(log, 0, sizeof *log);
    if (bytes < VS_REQUEST_BYTES_MAX || slots > UINT32_MAX)
        return -EINVAL;
    if (ring_alloc_init(&log->ring, bytes, LOG_UNIT_BYTES, (uint32_t)slots) < 0)
        return -ENOMEM;
    log->entries = calloc(slots, sizeof *log->entries);
    log->order = calloc(slots, sizeof(struct log_entry *));
    if (!log->entries || !log->order) {
        repl_log_free(log);
        return -ENOMEM;
    }
    return 0;
}

void repl_log_free(struct repl_log *log)
{
    free(log->order);
    free(log->entries);
    ring_alloc_free(&log->ring);
    memset(log, 0, sizeof *log);
}

struct log_entry *log_reserve(struct repl_log *log, enum log_kind kind, uint64_t offset, uint64_t length)
{
    uint8_t *data;
    int64_t slot = ring_take(&log->ring, kind == LOG_WRITE ? length : 0, &data);
    struct log_entry *e;
    if (slot < 0)
        return NULL;
    e = &log->entries[(uint64_t)slot % log->ring.slot_count];
    *e = (struct log_entry){.kind = (uint8_t)kind, .offset = offset, .length = length, .data = data, .slot = slot};
    return e;
}

void log_abandon(struct repl_log *log, struct log_entry *e)
{
    assert(e->generation == 0);
    ring_give(&log->ring, e->slot);
}

void log_append(struct repl_log *log, struct log_entry *e, uint64_t generation, uint64_t now_ns)
{
    assert(e->generation == 0 && generation > 0);
    assert(log->order_head - log->order_tail < log->ring.slot_count);
    e->generation = generation;
    e->completed_ns = now_ns;
    log->order[log->order_head++ % log->ring.slot_count] = e;
    log->lag_bytes += e->length;
}

struct log_entry *log_peek(struct repl_log *log)
{
    return log->order_next == log->order_head ? NULL : log->order[log->order_next % log->ring.slot_count];
}

void log_mirrored(struct repl_log *log, struct log_entry *e)
{
    assert(e->generation > 0 && !e->mirrored);
    e->mirrored = true;
    log->lag_bytes -= e->length;
    while (log->order_tail < log->order_next && log->order[log->order_tail % log->ring.slot_count]->mirrored) {
        ring_give(&log->ring, log->order[log->order_tail % log->ring.slot_count]->slot);
        log->order_tail++;
    }
}

uint64_t log_mirrored_prefix(const struct repl_log *log, uint64_t generation)
{
    if (log_drained(log))
        return generation;
    return log->order[log->order_tail % log->ring.slot_count]->generation - 1;
}

void log_drop_untaken(struct repl_log *log)
{
    struct log_entry *e;
    while ((e = log_peek(log))) {
        log_take(log);
        log_mirrored(log, e);
    }
}

uint64_t log_oldest_ns(const struct repl_log *log)
{
    return log_drained(log) ? 0 : log->order[log->order_tail % log->ring.slot_count]->completed_ns;
}
