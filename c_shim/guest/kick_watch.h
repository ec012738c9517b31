/* SPDX-License-Identifier: Apache-2.0
 *
 * A multishot poll on a ring's kick descriptor. It outlives its queue's
 * interest in it: it is freed, and the descriptor closed, with its last
 * completion.
 */
#ifndef VS_KICK_WATCH_H
#define VS_KICK_WATCH_H

#include "bell.h"

struct kick_watch;

/* Whoever is kicked, a ring: embedded in it. */
struct kick_target {
    struct kick_watch *watch; /* NULL: there is none */
    void (*kicked)(struct kick_target *target);
};

struct kick_watches {
    struct bells *bells; /* and their ring */
    struct list all;     /* every kick_watch whose poll is not over */
};

void kick_watches_init(struct kick_watches *all, struct bells *bells);
/* Takes fd. 0, -ENOMEM, or -EINVAL for what would always be readable. */
int kick_watch_start(struct kick_watches *all, struct kick_target *target, int fd);
/* Nobody cares about its kicks any more; a target without a watch is fine. */
void kick_watch_stop(struct kick_target *target);
/* The end: a read by a worker is not waited for. */
void kick_watches_stop_emptying(struct kick_watches *all);
/* The ring is gone, and with it the polls. */
void kick_watches_free(struct kick_watches *all);

#endif
