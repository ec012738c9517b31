/* SPDX-License-Identifier: Apache-2.0
 *
 * Which rings have their turn, and when the next one has. See serving.c.
 */
#ifndef VS_SERVING_H
#define VS_SERVING_H

#include <stdbool.h>
#include <stdint.h>

#include "guest.h"

struct vs_limits;
struct vs_snapshot;

void serving_init(struct guest *g);

/* Once a pass: takes up requests from the rings that have something, up to PASS_BUDGET of them. */
void serving_pump(struct guest *g);

/* Other limits from now on. */
void serving_limit(struct guest *g, const struct vs_limits *limits);
/* Once a pass: whether somebody waits still. */
static inline void serving_watch_limits(struct guest *g)
{
    if (g->limited.since_ns)
        limited_rings_pump(&g->limited, g->host->now_ns);
}

/* A ring waits for a limit. */
static inline bool serving_is_limited(const struct guest *g)
{
    return limited_rings_due_ns(&g->limited) != UINT64_MAX;
}

/* Some ring has its turn now. */
static inline bool serving_is_due(const struct guest *g)
{
    return guest_is_taken_up(&g->load) &&
           (!list_empty(&g->frontends.ready) || (g->room && !list_empty(&g->frontends.stalled)));
}

/* When some ring has, without anything else happening; UINT64_MAX: none. */
uint64_t serving_deadline_ns(const struct guest *g);

/* What the limits have held back. */
void serving_fill(const struct guest *g, struct vs_snapshot *s);

#endif
