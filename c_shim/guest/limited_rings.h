/* SPDX-License-Identifier: Apache-2.0
 *
 * Rings whose next request has to wait because of a limit (order/rate_limit.h), and whose turn it is. See
 * limited_rings.c.
 */
#ifndef VS_LIMITED_RINGS_H
#define VS_LIMITED_RINGS_H

#include <stdbool.h>
#include <stdint.h>

#include "blk_request.h"
#include "list.h"
#include "rate_limit.h"

struct frontends;
struct queue;

struct limited_rings {
    struct rate_limit limit;
    struct list waiting[2]; /* rings, by what they wait with: 0 a read, 1 a write; the first one's turn comes first */
    uint64_t due_ns[2];     /* not before then may the first of these go */
    bool last;              /* what went last, as above: of two that may go the other one is next */
    struct queue *turn;     /* the ring that is served because its turn has come; NULL: one that has not waited */
    /* What is shown. */
    uint64_t since_ns, waited_ns; /* some ring waits since; 0: none does. How long one did, before that */
    uint64_t requests, bytes;     /* that had to wait, or do */
};

void limited_rings_init(struct limited_rings *l);
/* Other limits from now on. Who waits is looked at anew. */
void limited_rings_set(struct limited_rings *l, struct frontends *f, const struct vs_limits *limits, uint64_t now_ns);

/* The ring whose turn has come, which waits no more; NULL: none. Only while there is a limit. */
struct queue *limited_rings_next(struct limited_rings *l, uint64_t now_ns);
/* Whether the request at the head of q has to wait: then q does. */
bool limited_rings_wait(struct limited_rings *l, struct queue *q, const struct blk_request *blk, uint64_t now_ns);
/* It was taken up. */
void limited_rings_taken(struct limited_rings *l, struct queue *q, const struct blk_request *blk);

/* limited_rings_due_ns(), while there is a limit. */
uint64_t limited_rings_next_ns(const struct limited_rings *l);

/* When the next one's turn comes; UINT64_MAX: nobody waits. */
static inline uint64_t limited_rings_due_ns(const struct limited_rings *l)
{
    return l->limit.on ? limited_rings_next_ns(l) : UINT64_MAX;
}

/* For how long some ring has waited, so far. */
uint64_t limited_rings_waited_ns(const struct limited_rings *l, uint64_t now_ns);
/* Rings stop and go without a word: once a pass, while one waits (since_ns), it is looked whether any does still. */
void limited_rings_pump(struct limited_rings *l, uint64_t now_ns);

#endif
