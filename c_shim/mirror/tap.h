/* SPDX-License-Identifier: Apache-2.0
 *
 * What the request path tells the mirror of each write, discard and zeroing: a place in the log is reserved before it
 * is taken from the ring; it is taken, and then completed or failed by the source. See tap.c.
 */
#ifndef VS_TAP_H
#define VS_TAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "repl_log.h"
#include "throttle.h"

struct bad_ranges;
struct difference;
struct disk_host;
struct mirror_state;

/* Part of a request. */
struct mirrored_write {
    uint64_t offset, length;
    struct log_entry *entry;
    bool captured;          /* counted as captured (mirror_state.h), else as uncaptured */
    uint64_t capture_epoch; /* of the capture for which it was */
};

struct tap {
    struct repl_log *log;
    struct vs_counts *counts;
    struct mirror_state *state;
    struct bad_ranges *bad;
    struct difference *difference;
    const struct disk_host *host;
    struct throttle throttle;
    uint64_t pull_ahead_bytes; /* so much of the log in use makes the guest get ahead; 0: its writes wait instead */
    uint64_t retry_ns;         /* a write that waits for time may be tried again then; 0: none does */
    uint64_t waits_since_ns;   /* a write waits for room in the log; 0: none does */
    uint64_t waited_ns;        /* by those that did */
    uint64_t ahead_bytes;      /* written since the guest got ahead (pull_ahead.c) */
};

/* A destination is attached. */
void tap_begin(struct tap *t);
/* Log room, if writes are captured. False: not now, it stays in the ring. */
bool tap_reserve(struct tap *t, struct mirrored_write *w, enum log_kind kind, bool may_unmap);
/* It is not taken after all. */
void tap_give_back(struct tap *t, struct mirrored_write *w);
/* Before it waits for anything, and before the source gets it. */
void tap_taken(struct tap *t, struct mirrored_write *w);
/* The source has it; returns its generation. Before the guest is shown that. */
uint64_t tap_completed(struct tap *t, struct mirrored_write *w);
/* The source has failed it, and the guest will be told. */
void tap_failed(struct tap *t, struct mirrored_write *w);
/* No write waits for room in the log any more: for how long one did is added up. */
void tap_wait_is_over(struct tap *t);
/* What writes change is kept track of, so that the bitmap has to know their extents first. */
bool tap_tracks(const struct tap *t);
bool tap_captures(const struct tap *t);

/* Where the bytes of a captured write are to go, once; NULL: it has none. The source is written from there (rule 1). */
static inline uint8_t *mirrored_write_bytes(const struct mirrored_write *w)
{
    return w->entry && w->entry->kind == LOG_WRITE ? w->entry->data : NULL;
}

#endif
