/* SPDX-License-Identifier: Apache-2.0 */
#include "activity_log.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* So many leave at once (a share of all): each time that some leave costs a flush. */
#define EVICT_SHARE 16

int activity_log_init(struct activity_log *l, uint32_t extents_max, uint64_t extent_bytes)
{
    uint64_t buckets = 16;
    assert(extents_max > 0 && extent_bytes && (extent_bytes & (extent_bytes - 1)) == 0);
    while (buckets < extents_max)
        buckets *= 2;
    memset(l, 0, sizeof *l);
    l->extents_max = extents_max;
    l->extent_shift = (unsigned)__builtin_ctzll(extent_bytes);
    l->bucket_mask = buckets - 1;
    list_init(&l->free);
    list_init(&l->used);
    l->slots = calloc(extents_max, sizeof *l->slots);
    l->buckets = calloc(buckets, sizeof(struct activity_slot *));
    if (!l->slots || !l->buckets) {
        activity_log_free(l);
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < extents_max; i++)
        list_append(&l->free, &l->slots[i].link);
    return 0;
}

void activity_log_free(struct activity_log *l)
{
    free(l->slots);
    free(l->buckets);
    l->slots = NULL;
    l->buckets = NULL;
}

static struct activity_slot **bucket_of(const struct activity_log *l, uint64_t extent)
{
    return &l->buckets[(extent * 0x9e3779b97f4a7c15u >> 32) & l->bucket_mask];
}

static struct activity_slot *find(const struct activity_log *l, uint64_t extent)
{
    struct activity_slot *s = *bucket_of(l, extent);
    while (s && s->extent != extent)
        s = s->chain;
    return s;
}

static uint64_t last_extent(const struct activity_log *l, uint64_t offset, uint64_t length)
{
    assert(length > 0);
    return (offset + length - 1) >> l->extent_shift;
}

bool activity_log_hold(struct activity_log *l, uint64_t offset, uint64_t length)
{
    uint64_t first = offset >> l->extent_shift, last = last_extent(l, offset, length);
    for (uint64_t extent = first; extent <= last; extent++) {
        const struct activity_slot *s = find(l, extent);
        if (!s || s->coming)
            return false;
    }
    for (uint64_t extent = first; extent <= last; extent++) {
        struct activity_slot *s = find(l, extent);
        s->writes++;
        list_remove(&s->link);
        list_append(&l->used, &s->link);
    }
    return true;
}

void activity_log_release(struct activity_log *l, uint64_t offset, uint64_t length)
{
    uint64_t last = last_extent(l, offset, length);
    for (uint64_t extent = offset >> l->extent_shift; extent <= last; extent++) {
        struct activity_slot *s = find(l, extent);
        assert(s && s->writes > 0);
        s->writes--;
    }
}

void activity_log_plan(struct activity_log *l)
{
    l->plan++;
}

static bool may_leave(const struct activity_log *l, const struct activity_slot *s)
{
    return s->writes == 0 && !s->coming && s->planned != l->plan;
}

static void leave(struct activity_log *l, struct activity_slot *s)
{
    struct activity_slot **at = bucket_of(l, s->extent);
    while (*at != s)
        at = &(*at)->chain;
    *at = s->chain;
    list_remove(&s->link);
    list_append(&l->free, &s->link);
    l->in_use--;
}

/* "wanted" slots are free in the end (and some more, if any had to leave), or none has left. */
static bool make_room(struct activity_log *l, unsigned wanted, bool *evicted)
{
    unsigned room = l->extents_max - l->in_use, can_leave = 0;
    if (room >= wanted)
        return true;
    list_each(node, &l->used)
        can_leave += may_leave(l, container_of(node, struct activity_slot, link));
    if (room + can_leave < wanted)
        return false;
    wanted += l->extents_max / EVICT_SHARE;
    list_each_safe(node, &l->used)
    {
        struct activity_slot *s = container_of(node, struct activity_slot, link);
        if (l->extents_max - l->in_use >= wanted)
            break;
        if (may_leave(l, s))
            leave(l, s);
    }
    *evicted = true;
    return true;
}

static void come(struct activity_log *l, uint64_t extent)
{
    struct activity_slot *s = container_of(list_pop(&l->free), struct activity_slot, link);
    struct activity_slot **bucket = bucket_of(l, extent);
    *s = (struct activity_slot){.extent = extent, .planned = l->plan, .coming = true, .chain = *bucket};
    *bucket = s;
    list_append(&l->used, &s->link);
    l->in_use++;
}

bool activity_log_add(struct activity_log *l, uint64_t offset, uint64_t length, bool *evicted)
{
    uint64_t first = offset >> l->extent_shift, last = last_extent(l, offset, length);
    unsigned missing = 0;
    for (uint64_t extent = first; extent <= last; extent++) {
        struct activity_slot *s = find(l, extent);
        if (s)
            s->planned = l->plan;
        else
            missing++;
    }
    if (!make_room(l, missing, evicted))
        return false;
    for (uint64_t extent = first; extent <= last; extent++)
        if (!find(l, extent))
            come(l, extent);
    return true;
}

uint64_t activity_log_list(const struct activity_log *l, uint64_t *extents)
{
    uint64_t count = 0;
    list_each(node, &l->used)
        extents[count++] = container_of(node, struct activity_slot, link)->extent;
    assert(count == l->in_use && count <= l->extents_max);
    return count;
}

void activity_log_commit(struct activity_log *l)
{
    list_each(node, &l->used)
        container_of(node, struct activity_slot, link)->coming = false;
}
