/* SPDX-License-Identifier: Apache-2.0
 *
 * A request that a limit does not let go yet stays in its ring, and its ring waits here.
 *
 * So a ring that is stopped, moved to another host or begun again by the next backend has lost nothing, and is answered
 * at once. Behind such a request wait those that come after it in the same ring, whatever they are; other rings go on.
 *
 * It is another wait than that for room in the log (tap.c), and looked at before it: a guest that has reached its limit
 * says nothing about the destination.
 *
 * Who has waited longest is served first. While others wait for the same, a turn is one request. Who comes later waits
 * behind them, also when it could go. Reads and writes wait apart, since they need not have the same limits; where they
 * have, their turns alternate.
 *
 * Invariant: a ring waits here only while due_ns of its direction lies ahead, its turn is about to come, or nothing is
 * taken up at all (guest_hold). The engine sleeps no longer than until limited_rings_due_ns().
 */
#include "limited_rings.h"

#include "attachment.h"

void limited_rings_init(struct limited_rings *l)
{
    list_init(&l->waiting[false]);
    list_init(&l->waiting[true]);
}

void limited_rings_set(struct limited_rings *l, struct frontends *f, const struct vs_limits *limits, uint64_t now_ns)
{
    rate_limit_set(&l->limit, limits, now_ns);
    for (unsigned writes = 0; writes < 2; writes++) {
        l->due_ns[writes] = 0;
        if (l->limit.on)
            continue;
        list_each(node, &l->waiting[writes])
            container_of(node, struct queue, ready_link)->limited = false;
        list_splice(&f->ready, &l->waiting[writes]);
    }
}

/* Flushes, and what is no I/O, are not limited. */
static bool counts(const struct blk_request *blk)
{
    return blk->op != VS_OP_FLUSH && blk->op != VS_OP_OTHER;
}

static bool is_write(const struct blk_request *blk)
{
    return blk->op != VS_OP_READ;
}

static bool is_due(const struct limited_rings *l, bool writes, uint64_t now_ns)
{
    return !list_empty(&l->waiting[writes]) && l->due_ns[writes] <= now_ns;
}

struct queue *limited_rings_next(struct limited_rings *l, uint64_t now_ns)
{
    bool writes = !l->last;
    if (!is_due(l, writes, now_ns))
        writes = !writes;
    if (!is_due(l, writes, now_ns))
        return NULL;
    return container_of(list_pop(&l->waiting[writes]), struct queue, ready_link);
}

bool limited_rings_wait(struct limited_rings *l, struct queue *q, const struct blk_request *blk, uint64_t now_ns)
{
    bool writes = is_write(blk), turn = l->turn == q;
    uint64_t wait_ns;
    if (!counts(blk))
        return false;
    if (turn || list_empty(&l->waiting[writes])) {
        wait_ns = rate_limit_wait_ns(&l->limit, writes, now_ns);
        if (wait_ns == 0)
            return false;
        l->due_ns[writes] = now_ns + wait_ns;
    }
    list_remove(&q->ready_link);
    if (turn)
        list_push(&l->waiting[writes], &q->ready_link);
    else
        list_append(&l->waiting[writes], &q->ready_link);
    if (!q->limited) {
        l->requests++;
        l->bytes += blk->length;
    }
    q->limited = true;
    if (!l->since_ns)
        l->since_ns = now_ns;
    return true;
}

void limited_rings_taken(struct limited_rings *l, struct queue *q, const struct blk_request *blk)
{
    if (!counts(blk))
        return;
    rate_limit_charge(&l->limit, is_write(blk), blk->length);
    l->last = is_write(blk);
    l->turn = NULL;
    q->limited = false;
}

uint64_t limited_rings_next_ns(const struct limited_rings *l)
{
    uint64_t due_ns = UINT64_MAX;
    for (unsigned writes = 0; writes < 2; writes++)
        if (!list_empty(&l->waiting[writes]) && l->due_ns[writes] < due_ns)
            due_ns = l->due_ns[writes];
    return due_ns;
}

uint64_t limited_rings_waited_ns(const struct limited_rings *l, uint64_t now_ns)
{
    return l->waited_ns + (l->since_ns ? now_ns - l->since_ns : 0);
}

void limited_rings_pump(struct limited_rings *l, uint64_t now_ns)
{
    if (limited_rings_due_ns(l) != UINT64_MAX)
        return;
    l->waited_ns = limited_rings_waited_ns(l, now_ns);
    l->since_ns = 0;
}
