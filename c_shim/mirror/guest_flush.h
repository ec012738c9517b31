/* SPDX-License-Identifier: Apache-2.0
 *
 * Who waits for durability: guest flushes, write-through writes, and the
 * control plane's drain. Each waits for the source, and in steady for the
 * count check; many share a flush. See guest_flush.c.
 */
#ifndef VS_GUEST_FLUSH_H
#define VS_GUEST_FLUSH_H

#include <stdbool.h>
#include <stdint.h>

#include "destination.h"
#include "list.h"

struct guest_load;
struct mirror_listener;
struct mirror_state;
struct source;

struct flush_waiter {
    struct list link;
    uint64_t since_ns;
    uint64_t generation;   /* flush_request: all up to it is to be durable */
    uint64_t source_flush; /* number of the source flush that it shares; 0: none yet */
    const void *owner;     /* the queue of a request; NULL: the control plane's */
    bool destination_only; /* a source that cannot be flushed must be possible to leave */
    bool released;         /* no pause holds it: its frontend could not wait any longer */
    /* Called once, with 0 or a negative errno. */
    void (*done)(struct flush_waiter *w, int result);
};

/* What it needs of other rooms. */
struct guest_flush_rooms {
    struct destination *destination;
    const struct source *source;
    struct vs_counts *counts;
    struct mirror_state *state;
    struct mirror_listener *listener;
    const struct guest_load *load;
    const struct disk_host *host;
    struct mailbox *mailbox;
};

struct guest_flush {
    struct guest_flush_rooms rooms;
    struct list waiters;
    unsigned waiting;
    unsigned guest_waiting, guest_released; /* of these: a guest's, and those that no pause holds */
    struct disk_io source_io;
    struct destination_io destination_io;
    bool source_in_flight, destination_in_flight;
    uint64_t source_number;      /* of the source flush that began last */
    uint64_t source_generation;  /* G when it began */
    uint64_t destination_prefix; /* M when it began */
    uint64_t answered_ns;        /* when somebody was let go last */
};

void guest_flush_init(struct guest_flush *f, const struct guest_flush_rooms *rooms);
/* Waits until all up to generation is durable (done and destination_only are the caller's to set); done()
 * comes from guest_flush_pump(). */
void guest_flush_wait(struct guest_flush *f, struct flush_waiter *w, uint64_t generation);
/* The same of a guest's flush: up to what is complete now; and of a write-through write, that is: up to itself. */
void guest_flush_asked(struct guest_flush *f, struct flush_waiter *w);
void guest_flush_asked_for(struct guest_flush *f, struct flush_waiter *w, uint64_t generation);
/* The source flush of this number has failed: the error of those that shared it. */
void guest_flush_source_failed(struct guest_flush *f, uint64_t number, int error);
void guest_flush_pump(struct guest_flush *f);
/* How many guests' requests wait. */
static inline unsigned guest_flush_guests(const struct guest_flush *f)
{
    return f->guest_waiting;
}
/* Since when somebody (of this owner; NULL: anybody) has waited for the destination; UINT64_MAX: nobody does. */
uint64_t guest_flush_since_ns(const struct guest_flush *f, const void *owner);
/* How many (of this owner; NULL: of anybody) a pause holds. */
unsigned guest_flush_paused(const struct guest_flush *f, const void *owner);
/* They wait for no destination any more, but for the source and the state record as without a pause. How many. */
unsigned guest_flush_release(struct guest_flush *f, const void *owner);

#endif
