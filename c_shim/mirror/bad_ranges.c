/* SPDX-License-Identifier: Apache-2.0
 *
 * Keeps account of the ranges where the source is not to be trusted, and of those where the destination is better.
 *
 * A range is in doubt from a write there that the source has failed until one that succeeds. It is unreadable from a
 * read of the copy that failed until a write that succeeds, or until the copy begins anew.
 *
 * Where a write to the source has failed nobody knows what the source holds. A
 * destination that holds, durably, all that was written there before is better,
 * and is not overwritten with it. One that lacks something of it is worse: what
 * the guest has flushed since the mirror left it is on the source alone. So
 *
 *   - only a write that fails in steady makes a range spared, and not before
 *     the destination is flushed up to the generation of that moment. If steady
 *     ends earlier it does not become one;
 *   - a write that succeeds there ends it, in whatever state;
 *   - it speaks of one destination.
 *
 * To err is to spare too little: a copy then brings what the source has there,
 * of which every sector is an old one or one of the write that failed. When the
 * ranges become too many, no more are spared. Always a part of "doubt".
 */
#include "bad_ranges.h"

#define SPARED_MAX (VS_RANGES_MAX - 2)

void bad_ranges_load(struct bad_ranges *b, const struct vs_engine_config *config)
{
    for (uint32_t i = 0; i < config->doubt_count; i++)
        range_set_add(&b->doubt, config->doubt[i].offset, config->doubt[i].length);
    for (uint32_t i = 0; i < config->spared_count; i++)
        range_set_add(&b->spared, config->spared[i].offset, config->spared[i].length);
}

/* ---- what the disks say ------------------------------------------------------ */

static void spare_soon(struct bad_ranges *b, uint64_t offset, uint64_t length, const struct vs_counts *counts)
{
    if (b->spared.count + b->soon.count >= SPARED_MAX)
        return;
    range_set_add(&b->soon, offset, length);
    b->soon_at = counts->source_generation;
}

void bad_ranges_write_failed(struct bad_ranges *b, uint64_t offset, uint64_t length, bool mirrored,
                             const struct vs_counts *counts)
{
    range_set_add(&b->doubt, offset, length);
    if (mirrored)
        spare_soon(b, offset, length, counts);
}

/* One that cannot be cut in two would stay whole. */
static void spare_no_more(struct range_set *set, uint64_t offset, uint64_t length)
{
    if (set->count > SPARED_MAX && range_set_overlaps(set, offset, length))
        set->count = 0;
    range_set_clear(set, offset, length);
}

void bad_ranges_written(struct bad_ranges *b, uint64_t offset, uint64_t length, uint64_t generation)
{
    if (b->doubt.count) {
        range_set_clear(&b->doubt, offset, length);
        spare_no_more(&b->spared, offset, length);
        spare_no_more(&b->soon, offset, length);
    }
    if (range_set_overlaps(&b->unreadable, offset, length)) {
        range_set_clear(&b->unreadable, offset, length);
        b->healed_at = generation;
    }
}

void bad_ranges_not_read(struct bad_ranges *b, uint64_t offset, uint64_t length)
{
    range_set_add(&b->unreadable, offset, length);
}

/* ---- what follows from it ---------------------------------------------------- */

bool bad_ranges_any(const struct bad_ranges *b)
{
    return b->doubt.count || b->unreadable.count;
}

bool bad_ranges_overlap(const struct bad_ranges *b, uint64_t offset, uint64_t length)
{
    return range_set_overlaps(&b->doubt, offset, length) || range_set_overlaps(&b->unreadable, offset, length);
}

bool bad_ranges_healed(const struct bad_ranges *b, const struct vs_counts *counts)
{
    return b->healed_at <= counts->writes_flushed;
}

void bad_ranges_pump(struct bad_ranges *b, const struct vs_counts *counts)
{
    if (b->soon.count == 0 || !counts->mirrored_known || counts->writes_flushed < b->soon_at)
        return;
    for (uint32_t i = 0; i < b->soon.count && b->spared.count < SPARED_MAX; i++)
        range_set_add(&b->spared, b->soon.range[i].offset, b->soon.range[i].length);
    b->soon.count = 0;
}

/* ---- when they end ----------------------------------------------------------- */

void bad_ranges_leave_steady(struct bad_ranges *b, const struct vs_counts *counts)
{
    bad_ranges_pump(b, counts);
    b->soon.count = 0;
}

void bad_ranges_copy_begins(struct bad_ranges *b)
{
    b->unreadable.count = 0;
}

void bad_ranges_spare_none(struct bad_ranges *b)
{
    b->spared.count = b->soon.count = 0;
}

void bad_ranges_forget(struct bad_ranges *b)
{
    b->doubt.count = b->unreadable.count = 0;
    bad_ranges_spare_none(b);
}
