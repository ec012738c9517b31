/* SPDX-License-Identifier: Apache-2.0
 *
 * The counts, how they may change, and the count check that decides whether a flush may be confirmed. See counts.h.
 */
#include "counts.h"

#include <assert.h>

static void assert_order(const struct vs_counts *c)
{
    assert(c->source_flushed <= c->source_generation);
    assert(c->flush_request <= c->source_generation);
    if (c->mirrored_known) {
        assert(c->writes_flushed <= c->writes_mirrored);
        assert(c->writes_mirrored <= c->source_generation);
    }
}

static void raise_to(uint64_t *count, uint64_t value)
{
    if (value > *count)
        *count = value;
}

uint64_t counts_write_completed(struct vs_counts *c)
{
    c->source_generation++;
    return c->source_generation;
}

void counts_mirrored(struct vs_counts *c, uint64_t prefix)
{
    assert(c->mirrored_known);
    raise_to(&c->writes_mirrored, prefix);
    assert_order(c);
}

uint64_t counts_flush_requested(struct vs_counts *c)
{
    raise_to(&c->flush_request, c->source_generation);
    return c->source_generation;
}

void counts_source_flushed(struct vs_counts *c, uint64_t generation_at_begin)
{
    raise_to(&c->source_flushed, generation_at_begin);
    c->source_flush_known = 1;
    assert_order(c);
}

void counts_destination_flushed(struct vs_counts *c, uint64_t mirrored_at_begin)
{
    assert(c->mirrored_known);
    raise_to(&c->writes_flushed, mirrored_at_begin);
    assert_order(c);
}

void counts_enter_steady(struct vs_counts *c, uint64_t prefix)
{
    c->mirrored_known = 1;
    c->writes_mirrored = c->writes_flushed = prefix;
    assert_order(c);
}

void counts_leave_steady(struct vs_counts *c)
{
    c->mirrored_known = 0;
    c->writes_mirrored = c->writes_flushed = 0;
}

void counts_exchange(struct vs_counts *c, bool keep_mirror)
{
    uint64_t old_source_flushed = c->source_flushed;
    assert(c->mirrored_known && c->writes_mirrored == c->source_generation);
    assert(c->source_flush_known || !keep_mirror);
    /* Both disks hold 1 .. G; what is durable on each changes places with them. */
    c->source_flushed = c->writes_flushed;
    c->source_flush_known = 1;
    if (keep_mirror)
        c->writes_flushed = old_source_flushed;
    else
        counts_leave_steady(c);
    assert_order(c);
}

bool counts_source_holds(const struct vs_counts *c, uint64_t flush_request)
{
    /* Generation 0 is not nothing: a former process may have left writes in a volatile cache. */
    return c->source_flush_known && flush_request <= c->source_flushed;
}

int vs_count_check(uint64_t flush_request, uint64_t writes_mirrored, uint64_t writes_flushed)
{
    if (flush_request <= writes_flushed)
        return VS_CHECK_HELD;
    return flush_request <= writes_mirrored ? VS_CHECK_FLUSH : VS_CHECK_WAIT;
}
