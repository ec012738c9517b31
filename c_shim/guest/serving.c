/* SPDX-License-Identifier: Apache-2.0
 *
 * Turns: the rings that have something to be taken up (frontends.ready) are served one after the other, each as long
 * as it has something and the pass's budget lasts. Who had no turn is the first of the next pass.
 *
 * Two kinds of rings are not among them. Who is stalled waits for room, and is looked at again once something was given
 * back (room) or its time has come (tap.retry_ns). Who is limited waits for its turn by a limit (limited_rings.c).
 */
#include "serving.h"

#include "request_path.h"

void serving_init(struct guest *g)
{
    limited_rings_init(&g->limited);
    serving_limit(g, &g->config->limits);
}

void serving_limit(struct guest *g, const struct vs_limits *limits)
{
    limited_rings_set(&g->limited, &g->frontends, limits, g->host->now_ns);
}

/* Whose turn it is. Rings that have waited for a limit come first, but have no more than half of a pass: where it does
 * not hold them back any more, they would leave nothing to the others. */
static struct queue *next_queue(struct guest *g, struct list *turn)
{
    struct limited_rings *limited = &g->limited;
    struct list *node;
    limited->turn = NULL;
    if (limited->limit.on && g->taken_in_pass < PASS_BUDGET / 2 &&
        (limited->turn = limited_rings_next(limited, g->host->now_ns)))
        return limited->turn;
    node = list_pop(turn);
    return node ? container_of(node, struct queue, ready_link) : NULL;
}

void serving_pump(struct guest *g)
{
    struct list turn;
    struct queue *q;
    if (!guest_is_taken_up(&g->load))
        return;
    if (g->room || (g->mirror->tap.retry_ns && g->mirror->tap.retry_ns <= g->host->now_ns)) {
        g->room = false;
        g->mirror->tap.retry_ns = 0;
        queues_retry(&g->frontends);
    }
    list_init(&turn);
    list_splice(&turn, &g->frontends.ready);
    g->taken_in_pass = 0;
    while (g->taken_in_pass < PASS_BUDGET && (q = next_queue(g, &turn))) {
        switch (request_path_service(g, q)) {
        case SERVICE_MORE:
            list_append(&g->frontends.ready, &q->ready_link);
            break;
        case SERVICE_STALLED:
            list_append(&g->frontends.stalled, &q->ready_link);
            break;
        case SERVICE_LIMITED:
        case SERVICE_EMPTY:
            break;
        }
    }
    if (!list_empty(&turn)) {
        list_splice(&turn, &g->frontends.ready); /* those that had no turn are the first of the next pass */
        list_splice(&g->frontends.ready, &turn);
    }
}

uint64_t serving_deadline_ns(const struct guest *g)
{
    uint64_t deadline = UINT64_MAX, retry_ns = g->mirror->tap.retry_ns;
    if (!guest_is_taken_up(&g->load))
        return UINT64_MAX;
    if (retry_ns && !list_empty(&g->frontends.stalled))
        deadline = retry_ns;
    if (limited_rings_due_ns(&g->limited) < deadline)
        deadline = limited_rings_due_ns(&g->limited);
    return deadline;
}

void serving_fill(const struct guest *g, struct vs_snapshot *s)
{
    s->limited_requests = g->limited.requests;
    s->limited_bytes = g->limited.bytes;
    s->limited_ns = limited_rings_waited_ns(&g->limited, g->host->now_ns);
}
