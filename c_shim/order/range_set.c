/* SPDX-License-Identifier: Apache-2.0
 *
 * A few ranges of a disk, merged when there are too many. See range_set.h.
 */
#include "range_set.h"

#include <string.h>

static uint64_t end_of(const struct vs_range *r)
{
    return r->offset + r->length;
}

static void remove_at(struct range_set *s, uint32_t i)
{
    memmove(&s->range[i], &s->range[i + 1], (s->count - i - 1) * sizeof s->range[0]);
    s->count--;
}

static void merge_nearest(struct range_set *s)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i + 1 < s->count; i++)
        if (s->range[i + 1].offset - end_of(&s->range[i]) < s->range[best + 1].offset - end_of(&s->range[best]))
            best = i;
    s->range[best].length = end_of(&s->range[best + 1]) - s->range[best].offset;
    remove_at(s, best + 1);
}

static void insert_at(struct range_set *s, uint32_t i, uint64_t offset, uint64_t length)
{
    memmove(&s->range[i + 1], &s->range[i], (s->count - i) * sizeof s->range[0]);
    s->range[i] = (struct vs_range){offset, length};
    s->count++;
}

void range_set_add(struct range_set *s, uint64_t offset, uint64_t length)
{
    uint64_t end = offset + length;
    uint32_t i = 0;
    while (i < s->count && end_of(&s->range[i]) < offset)
        i++;
    while (i < s->count && s->range[i].offset <= end) { /* touching ones become part of it */
        if (s->range[i].offset < offset)
            offset = s->range[i].offset;
        if (end_of(&s->range[i]) > end)
            end = end_of(&s->range[i]);
        remove_at(s, i);
    }
    if (s->count == VS_RANGES_MAX) {
        merge_nearest(s);
        range_set_add(s, offset, end - offset);
        return;
    }
    insert_at(s, i, offset, end - offset);
}

void range_set_clear(struct range_set *s, uint64_t offset, uint64_t length)
{
    uint64_t end = offset + length;
    for (uint32_t i = 0; i < s->count;) {
        struct vs_range r = s->range[i];
        if (end_of(&r) <= offset || r.offset >= end) {
            i++;
            continue;
        }
        remove_at(s, i);
        if (end_of(&r) > end)
            insert_at(s, i, end, end_of(&r) - end);
        if (r.offset < offset) {
            if (s->count == VS_RANGES_MAX) { /* no room to cut one in two: all of it stays */
                s->range[i] = r;
                i++;
                continue;
            }
            insert_at(s, i, r.offset, offset - r.offset);
            i++;
        }
    }
}

bool range_set_overlaps(const struct range_set *s, uint64_t offset, uint64_t length)
{
    for (uint32_t i = 0; i < s->count; i++)
        if (s->range[i].offset < offset + length && offset < end_of(&s->range[i]))
            return true;
    return false;
}

bool range_set_first(const struct range_set *s, uint64_t offset, uint64_t end, struct vs_range *part)
{
    for (uint32_t i = 0; i < s->count; i++) {
        uint64_t from = s->range[i].offset, to = end_of(&s->range[i]);
        if (from >= end)
            return false;
        if (to <= offset)
            continue;
        part->offset = from > offset ? from : offset;
        part->length = (to < end ? to : end) - part->offset;
        return true;
    }
    return false;
}
