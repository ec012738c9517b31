/* SPDX-License-Identifier: Apache-2.0
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
 * ranges become too many, no more are spared. Always a part of e->doubt.
 */
#include "spared.h"

#include "engine.h"

#define SPARED_MAX (VS_RANGES_MAX - 2)

void spared_add(struct vs_engine *e, uint64_t offset, uint64_t length)
{
    struct spared *s = &e->spared;
    if (s->ranges.count + s->soon.count >= SPARED_MAX)
        return;
    range_set_add(&s->soon, offset, length);
    s->soon_at = e->counts.source_generation;
}

/* One that cannot be cut in two would stay whole. */
static void clear(struct range_set *set, uint64_t offset, uint64_t length)
{
    if (set->count > SPARED_MAX && range_set_overlaps(set, offset, length))
        set->count = 0;
    range_set_clear(set, offset, length);
}

void spared_clear(struct vs_engine *e, uint64_t offset, uint64_t length)
{
    clear(&e->spared.ranges, offset, length);
    clear(&e->spared.soon, offset, length);
}

void spared_pump(struct vs_engine *e)
{
    struct spared *s = &e->spared;
    if (s->soon.count == 0 || !e->counts.mirrored_known || e->counts.writes_flushed < s->soon_at)
        return;
    for (uint32_t i = 0; i < s->soon.count && s->ranges.count < SPARED_MAX; i++)
        range_set_add(&s->ranges, s->soon.range[i].offset, s->soon.range[i].length);
    s->soon.count = 0;
}

void spared_leave_steady(struct vs_engine *e)
{
    spared_pump(e);
    e->spared.soon.count = 0;
}

void spared_forget(struct vs_engine *e)
{
    e->spared.ranges.count = e->spared.soon.count = 0;
}
