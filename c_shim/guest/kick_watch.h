/* SPDX-License-Identifier: Apache-2.0
 *
 * A multishot poll on a ring's kick descriptor. It outlives its queue's
 * interest in it: it is freed, and the descriptor closed, with its last
 * completion.
 */
#ifndef VS_KICK_WATCH_H
#define VS_KICK_WATCH_H

#include "engine.h"

/* Takes fd. 0, -ENOMEM, or -EINVAL for what would always be readable. */
int kick_watch_start(struct queue *q, int fd);
/* Nobody cares about its kicks any more; a queue without one is fine. */
void kick_watch_stop(struct queue *q);
/* The ring is gone, and with it the polls. */
/* The end: a read by a worker is not waited for. */
void kick_watches_stop_emptying(struct vs_engine *e);
void kick_watches_free(struct vs_engine *e);

#endif
