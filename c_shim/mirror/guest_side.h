/* SPDX-License-Identifier: Apache-2.0
 *
 * The guest as the mirror sees it: how much it has to do, whether it is held, and four things that it is rarely told.
 * The guest's side writes this and sets the listener; the mirror reads, and calls.
 */
#ifndef VS_GUEST_SIDE_H
#define VS_GUEST_SIDE_H

#include <stdbool.h>
#include <stdint.h>

#include "bounds.h"

struct disk_io;

/* Why no request is taken up. */
enum guest_hold {
    GUEST_HOLD_SWITCH = 1u << 0,       /* from the gate's closing until it opens */
    GUEST_HOLD_SOURCE_FAILED = 1u << 1 /* the source is about to be left: nothing more goes there */
};

struct guest_load {
    unsigned in_flight;     /* requests taken up, not answered */
    uint64_t last_taken_ns; /* when one was last taken up */
    unsigned holds;         /* of enum guest_hold */
};

static inline bool guest_is_taken_up(const struct guest_load *g)
{
    return g->holds == 0;
}

/* Between two requests of a guest that has one in flight at a time, none is; and yet it is at work. */
static inline bool guest_took_up_lately(const struct guest_load *g, uint64_t now_ns)
{
    return g->last_taken_ns && now_ns - g->last_taken_ns < GUEST_WORKS_NS;
}

static inline bool guest_works(const struct guest_load *g, uint64_t now_ns)
{
    return g->in_flight || guest_took_up_lately(g, now_ns);
}

struct mirror_listener {
    /* Something was given back that a request may wait for. */
    void (*room_freed)(struct mirror_listener *l);
    /* No write waits for room in the log any more. */
    void (*capture_ended)(struct mirror_listener *l);
    /* A checkpoint begins: difference_mark() for each write that is at the source. */
    void (*mark_in_flight)(struct mirror_listener *l);
    /* A flush of the source has failed. True: it is kept back, and guest_flush_source_failed() may follow. */
    bool (*source_flush_failed)(struct mirror_listener *l, const struct disk_io *io, uint64_t number);
};

#endif
