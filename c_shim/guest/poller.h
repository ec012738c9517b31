/* SPDX-License-Identifier: Apache-2.0
 *
 * Looking for work for a moment before going to sleep. See poller.c.
 */
#ifndef VS_POLLER_H
#define VS_POLLER_H

#include <stdbool.h>
#include <stdint.h>

#include "disk.h"
#include "list.h"

struct queue;

/* How long something has lately been waited for. */
struct expectation {
    uint64_t window_ns;       /* awake at most so long at once */
    uint64_t gap_ns;          /* smoothed: from nothing to do to the next thing to do */
    uint64_t asleep_since_ns; /* nothing to do since then, and asleep; 0: awake, or it does not count */
};

/* What is under way, and so what may come next. */
struct outlook {
    bool takes_up;       /* requests are taken up: no switch holds the guest */
    bool disk;           /* a disk has something to do */
    bool flush;          /* somebody waits for durability */
    uint64_t flushed_ns; /* when somebody's waiting for it was last over */
};

struct poller {
    struct disk_host *host; /* its ring and its threads are looked at, too */
    uint64_t fixed_ns;      /* where it is not adaptive: so long each time; 0: never */
    bool adaptive;          /* only where it has paid lately */
    bool willing;           /* rings that are found empty are looked at again, and not asked for a kick */
    struct list rings;      /* these, by queue.ready_link */
    struct expectation guest, disk;
    uint64_t not_before_ns; /* the core was wanted by somebody else: not again until then */
    uint64_t back_off_ns;
    uint64_t polled_ns; /* spent looking, in all */
    uint64_t polls, hits;
};

void poller_init(struct poller *p, struct disk_host *host, uint32_t poll_us);
/* In each pass, before the rings are served: those that were found empty are looked at, and it is decided whether
 * what is found empty now will be. */
void poller_begin(struct poller *p, struct outlook outlook);
/* A ring was found empty. True: it is looked at again, and is not to be asked for a kick. */
bool poller_keeps(struct poller *p, struct queue *q);
/* Nothing is to be done for wait_ns: looks for work while it may pay. True: something came, and may be in a
 * ring, in "ready", or a completion. False: go to sleep; every ring has been asked for a kick, and was empty after. */
bool poller_look(struct poller *p, struct outlook outlook, uint64_t wait_ns);
/* The thread has slept and is awake again: for how long it would have had to look is learnt from that. */
void poller_woken(struct poller *p);

#endif
