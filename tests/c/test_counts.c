/* SPDX-License-Identifier: Apache-2.0
 *
 * The counts against a second, slower reading of docs/durability.md: the count
 * check for all small values and about the edges of 64 bits; the counts for
 * every sequence of their operations up to a length.
 */
#include "counts.h"
#include "harness.h"

static enum vs_check check_as_written(uint64_t r, uint64_t m, uint64_t f)
{
    bool held = !(r > f);
    bool replicated = !(m < r);
    return held ? VS_CHECK_HELD : replicated ? VS_CHECK_FLUSH : VS_CHECK_WAIT;
}

static void count_check_small(void)
{
    for (uint64_t r = 0; r < 24; r++)
        for (uint64_t m = 0; m < 24; m++)
            for (uint64_t f = 0; f <= m; f++)
                CHECK_EQUAL(vs_count_check(r, m, f), check_as_written(r, m, f));
}

static void count_check_edges(void)
{
    static const uint64_t edge[] = {
        0, 1, INT32_MAX, UINT32_MAX, UINT32_MAX + 1ull, INT64_MAX, INT64_MAX + 1ull, UINT64_MAX - 1, UINT64_MAX};
    enum { EDGES = sizeof edge / sizeof edge[0] };
    for (int r = 0; r < EDGES; r++)
        for (int m = 0; m < EDGES; m++)
            for (int f = 0; f <= m; f++)
                CHECK_EQUAL(vs_count_check(edge[r], edge[m], edge[f]), check_as_written(edge[r], edge[m], edge[f]));
}

/* All that happened, kept as history: what the counts must say follows from it. */
struct history {
    uint64_t written;         /* G */
    uint64_t source_at_flush; /* G when the flush of the source that is under way began */
    uint64_t source_durable;
    uint64_t replicated, replicated_at_flush, replica_durable;
    uint64_t greatest_request;
    bool source_flushing, replica_flushing, steady, source_flushed_once;
};

enum operation {
    WRITE,
    REPLICATE,
    REQUEST,
    SOURCE_BEGIN,
    SOURCE_END,
    REPLICA_BEGIN,
    REPLICA_END,
    ENTER,
    LEAVE,
    EXCHANGE,
    EXCHANGE_AWAY,
    OPERATIONS
};

/* False: cannot happen in this state. */
static bool apply(struct history *h, struct vs_counts *c, enum operation op)
{
    uint64_t swap;
    switch (op) {
    case WRITE:
        h->written++;
        CHECK_EQUAL(counts_write_completed(c), h->written);
        return true;
    case REPLICATE:
        if (!h->steady || h->replicated == h->written)
            return false;
        counts_mirrored(c, ++h->replicated);
        return true;
    case REQUEST:
        h->greatest_request = h->written;
        CHECK_EQUAL(counts_flush_requested(c), h->written);
        return true;
    case SOURCE_BEGIN:
        if (h->source_flushing)
            return false;
        h->source_flushing = true;
        h->source_at_flush = h->written;
        return true;
    case SOURCE_END:
        if (!h->source_flushing)
            return false;
        h->source_flushing = false;
        h->source_flushed_once = true;
        if (h->source_at_flush > h->source_durable)
            h->source_durable = h->source_at_flush;
        counts_source_flushed(c, h->source_at_flush);
        return true;
    case REPLICA_BEGIN:
        if (!h->steady || h->replica_flushing)
            return false;
        h->replica_flushing = true;
        h->replicated_at_flush = h->replicated;
        return true;
    case REPLICA_END:
        if (!h->replica_flushing)
            return false;
        h->replica_flushing = false;
        if (h->replicated_at_flush > h->replica_durable)
            h->replica_durable = h->replicated_at_flush;
        counts_destination_flushed(c, h->replicated_at_flush);
        return true;
    case ENTER:
        if (h->steady)
            return false;
        h->steady = true;
        h->replicated = h->replica_durable = h->written;
        counts_enter_steady(c, h->written);
        return true;
    case LEAVE:
        if (!h->steady)
            return false;
        h->steady = h->replica_flushing = false;
        counts_leave_steady(c);
        return true;
    default: /* an exchange; no flush is under way behind a closed gate */
        if (!h->steady || h->replicated != h->written || h->source_flushing || h->replica_flushing)
            return false;
        if (op == EXCHANGE && !h->source_flushed_once)
            return false;              /* a source that was never flushed can be left, not kept as a mirror */
        h->source_flushed_once = true; /* the new source was, when the mirror became steady */
        swap = h->source_durable;
        h->source_durable = h->replica_durable;
        h->replica_durable = swap;
        h->steady = op == EXCHANGE;
        counts_exchange(c, op == EXCHANGE);
        return true;
    }
}

static void compare(const struct history *h, const struct vs_counts *c)
{
    CHECK_EQUAL(c->source_generation, h->written);
    CHECK_EQUAL(c->source_flushed, h->source_durable);
    CHECK_EQUAL(c->flush_request, h->greatest_request);
    CHECK_EQUAL(c->source_flush_known, h->source_flushed_once);
    CHECK_EQUAL(c->mirrored_known, h->steady);
    for (uint64_t r = 0; r <= h->written; r++)
        CHECK_EQUAL(counts_source_holds(c, r), h->source_flushed_once && r <= h->source_durable);
    if (!h->steady)
        return;
    CHECK_EQUAL(c->writes_mirrored, h->replicated);
    CHECK_EQUAL(c->writes_flushed, h->replica_durable);
    CHECK(c->writes_flushed <= c->writes_mirrored && c->writes_mirrored <= c->source_generation);
}

static uint64_t sequences;

static void descend(struct history h, struct vs_counts c, int depth)
{
    compare(&h, &c);
    sequences++;
    for (int op = 0; depth > 0 && op < OPERATIONS; op++) {
        struct history next = h;
        struct vs_counts counts = c;
        if (apply(&next, &counts, (enum operation)op))
            descend(next, counts, depth - 1);
    }
}

static void every_sequence(void)
{
    descend((struct history){0}, (struct vs_counts){0}, 8);
    CHECK(sequences > 100000);
}

/* Steady from the start, so that the sequences reach further into it. */
static void every_sequence_in_steady(void)
{
    struct history h = {0};
    struct vs_counts c = {0};
    static const enum operation before[] = {WRITE, WRITE, SOURCE_BEGIN, SOURCE_END, ENTER, WRITE};
    for (size_t i = 0; i < sizeof before / sizeof before[0]; i++)
        CHECK(apply(&h, &c, before[i]));
    descend(h, c, 8);
}

/* Generation 0 is not nothing: what a former process wrote may be in a cache. */
static void nothing_is_durable_at_first(void)
{
    struct vs_counts c = {0};
    CHECK(!counts_source_holds(&c, 0));
    counts_source_flushed(&c, 0);
    CHECK(counts_source_holds(&c, 0));
    CHECK(!counts_source_holds(&c, 1));
}

/* A late completion of an early flush takes nothing back. */
static void counts_never_fall(void)
{
    struct vs_counts c = {0};
    for (int i = 0; i < 10; i++)
        counts_write_completed(&c);
    counts_source_flushed(&c, 7);
    counts_source_flushed(&c, 3);
    CHECK_EQUAL(c.source_flushed, 7);
    counts_enter_steady(&c, 10);
    counts_destination_flushed(&c, 4);
    CHECK_EQUAL(c.writes_flushed, 10);
    counts_mirrored(&c, 5);
    CHECK_EQUAL(c.writes_mirrored, 10);
}

/* Attached anew with counts already high. */
static void high_counts(void)
{
    struct vs_counts c = {.source_generation = UINT64_MAX - 2};
    CHECK_EQUAL(counts_write_completed(&c), UINT64_MAX - 1);
    counts_enter_steady(&c, UINT64_MAX - 1);
    CHECK_EQUAL(vs_count_check(counts_flush_requested(&c), c.writes_mirrored, c.writes_flushed), VS_CHECK_HELD);
    CHECK_EQUAL(counts_write_completed(&c), UINT64_MAX);
    CHECK_EQUAL(vs_count_check(counts_flush_requested(&c), c.writes_mirrored, c.writes_flushed), VS_CHECK_WAIT);
    counts_mirrored(&c, UINT64_MAX);
    CHECK_EQUAL(vs_count_check(UINT64_MAX, c.writes_mirrored, c.writes_flushed), VS_CHECK_FLUSH);
}

int main(void)
{
    test("the count check, all small values", count_check_small);
    test("the count check at the edges of 64 bits", count_check_edges);
    test("generation 0 is not durable before a flush", nothing_is_durable_at_first);
    test("the counts never fall", counts_never_fall);
    test("high counts", high_counts);
    test("every sequence of operations", every_sequence);
    test("every sequence from a steady state", every_sequence_in_steady);
    return tests_end();
}
