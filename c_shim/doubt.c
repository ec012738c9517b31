/* SPDX-License-Identifier: Apache-2.0 */
#include "doubt.h"

#include <string.h>

static uint64_t end_of(const struct vs_doubt_range *r)
{
    return r->offset + r->length;
}

static void remove_at(struct doubt *d, uint32_t i)
{
    memmove(&d->range[i], &d->range[i + 1], (d->count - i - 1) * sizeof d->range[0]);
    d->count--;
}

static void merge_nearest(struct doubt *d)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i + 1 < d->count; i++)
        if (d->range[i + 1].offset - end_of(&d->range[i]) < d->range[best + 1].offset - end_of(&d->range[best]))
            best = i;
    d->range[best].length = end_of(&d->range[best + 1]) - d->range[best].offset;
    remove_at(d, best + 1);
}

static void insert_at(struct doubt *d, uint32_t i, uint64_t offset, uint64_t length)
{
    memmove(&d->range[i + 1], &d->range[i], (d->count - i) * sizeof d->range[0]);
    d->range[i] = (struct vs_doubt_range){offset, length};
    d->count++;
}

void doubt_add(struct doubt *d, uint64_t offset, uint64_t length)
{
    uint64_t end = offset + length;
    uint32_t i = 0;
    while (i < d->count && end_of(&d->range[i]) < offset)
        i++;
    while (i < d->count && d->range[i].offset <= end) { /* touching ones become part of it */
        if (d->range[i].offset < offset)
            offset = d->range[i].offset;
        if (end_of(&d->range[i]) > end)
            end = end_of(&d->range[i]);
        remove_at(d, i);
    }
    if (d->count == VS_DOUBT_RANGES_MAX) {
        merge_nearest(d);
        doubt_add(d, offset, end - offset);
        return;
    }
    insert_at(d, i, offset, end - offset);
}

void doubt_clear(struct doubt *d, uint64_t offset, uint64_t length)
{
    uint64_t end = offset + length;
    for (uint32_t i = 0; i < d->count;) {
        struct vs_doubt_range r = d->range[i];
        if (end_of(&r) <= offset || r.offset >= end) {
            i++;
            continue;
        }
        remove_at(d, i);
        if (end_of(&r) > end)
            insert_at(d, i, end, end_of(&r) - end);
        if (r.offset < offset) {
            if (d->count == VS_DOUBT_RANGES_MAX) { /* no room to cut one in two: all of it stays in doubt */
                d->range[i] = r;
                i++;
                continue;
            }
            insert_at(d, i, r.offset, offset - r.offset);
            i++;
        }
    }
}

bool doubt_overlaps(const struct doubt *d, uint64_t offset, uint64_t length)
{
    for (uint32_t i = 0; i < d->count; i++)
        if (d->range[i].offset < offset + length && offset < end_of(&d->range[i]))
            return true;
    return false;
}
