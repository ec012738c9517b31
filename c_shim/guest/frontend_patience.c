/* SPDX-License-Identifier: Apache-2.0
 *
 * A frontend that has told a ring to become quiet, or its memory to go, waits,
 * and the whole VM may be frozen for that long. So what its requests wait for
 * is given up in time: the destination, or a pause.
 */
#include "frontend_patience.h"

#include <errno.h>

#include "attachment.h"
#include "guest.h"
#include "read_fallback.h"

static bool waits_for_destination(const struct guest *g, const struct queue *q)
{
    return guest_flush_since_ns(&g->mirror->flush, q) != UINT64_MAX || read_fallback_waits(g, q) || g->failover.pending;
}

static uint64_t ring_deadline_ns(const struct queue *q)
{
    return q->stop_token || q->disable_token ? q->quiet_deadline_ns : UINT64_MAX;
}

/* Only while somebody waits for the destination does giving it up make a ring quiet. */
static uint64_t destination_deadline_ns(const struct guest *g)
{
    uint64_t deadline = UINT64_MAX;
    if (!g->frontends.active || g->frontends.quieting == 0)
        return deadline;
    for (unsigned i = 0; i < VS_MAX_QUEUES; i++) {
        const struct queue *q = &g->frontends.active->queue[i];
        if (ring_deadline_ns(q) < deadline && waits_for_destination(g, q))
            deadline = ring_deadline_ns(q);
    }
    return deadline;
}

/* How long a pause may hold what is in flight of this ring. */
static uint64_t pause_deadline_ns(const struct queue *q)
{
    uint64_t ring = ring_deadline_ns(q), attachment = q->attachment->patience_ends_ns;
    return attachment && attachment < ring ? attachment : ring;
}

/* A pause must not freeze a whole VM, whose frontend waits for a ring, its end, or memory. */
static void release_paused(struct guest *g)
{
    struct vs_event event = {.kind = VS_EV_PAUSE_RELEASED};
    for (unsigned i = 0; g->mirror->state.pause.on && g->frontends.active && i < VS_MAX_QUEUES; i++)
        if (pause_deadline_ns(&g->frontends.active->queue[i]) <= g->host->now_ns)
            event.value += guest_flush_release(&g->mirror->flush, &g->frontends.active->queue[i]);
    if (event.value == 0)
        return;
    g->mirror->state.pause.released += event.value;
    mailbox_post(g->mailbox, &event);
}

void attachments_check_deadlines(struct guest *g)
{
    if (destination_deadline_ns(g) <= g->host->now_ns && destination_attached(&g->mirror->destination))
        mirror_degrade(g->mirror, VS_REASON_STOP_TIMEOUT, -ETIMEDOUT);
    release_paused(g);
}

uint64_t attachments_deadline_ns(const struct guest *g)
{
    uint64_t deadline = destination_deadline_ns(g);
    for (unsigned i = 0; g->mirror->state.pause.on && g->frontends.active && i < VS_MAX_QUEUES; i++) {
        const struct queue *q = &g->frontends.active->queue[i];
        if (pause_deadline_ns(q) < deadline && guest_flush_paused(&g->mirror->flush, q))
            deadline = pause_deadline_ns(q);
    }
    return deadline;
}
