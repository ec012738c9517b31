/* SPDX-License-Identifier: Apache-2.0
 *
 * Maps the frontend's region for requests in flight, and keeps the record of a split ring in it. See inflight.h.
 */
#include "inflight.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "guest_memory.h"
#include "inflight_packed.h"
#include "shared_memory.h"

/* Whether all rings' parts are new, or laid out as here: another backend's marks would be read as ours. */
static bool layout_known(const struct inflight_area *area)
{
    for (uint32_t i = 0; i < area->queues; i++) {
        const struct inflight_header *r = inflight_record(area, i);
        uint16_t version = READ_ONCE(r->version);
        if (version && (version != INFLIGHT_VERSION || READ_ONCE(r->desc_num) != VS_MAX_QUEUE_SIZE))
            return false;
    }
    return true;
}

int inflight_map(struct inflight_area *area, int fd, uint64_t bytes, uint64_t offset, uint32_t queues, bool packed)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), start = offset & ~(page - 1);
    uint32_t ring_bytes = packed ? VS_INFLIGHT_PACKED_RING_BYTES : VS_INFLIGHT_RING_BYTES;
    uint64_t need = (uint64_t)queues * ring_bytes;
    struct stat st;
    int rc = 0;
    inflight_unmap(area);
    if (queues == 0 || queues > VS_MAX_QUEUES || bytes < need || offset > INT64_MAX - need || offset % 64)
        rc = -EINVAL;
    else if (fstat(fd, &st) < 0)
        rc = -errno;
    else if ((uint64_t)st.st_size < offset + need)
        rc = -EINVAL;
    if (rc == 0) {
        area->map_bytes = (offset - start + need + page - 1) & ~(page - 1);
        area->map = mmap(NULL, area->map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)start);
        if (area->map == MAP_FAILED) {
            rc = -errno;
            area->map = NULL;
        } else {
            area->base = (uint8_t *)area->map + (offset - start);
            area->queues = queues;
            area->packed = packed;
            area->ring_bytes = ring_bytes;
            area->sigbus_slot = guest_memory_watch(area->map, area->map_bytes);
            rc = area->sigbus_slot < 0 ? -ENOSPC : layout_known(area) ? 0 : -EINVAL;
            if (rc < 0)
                inflight_unmap(area);
        }
    }
    close(fd);
    return rc;
}

void inflight_unmap(struct inflight_area *area)
{
    if (!area->map)
        return;
    guest_memory_unwatch(area->sigbus_slot);
    munmap(area->map, area->map_bytes);
    area->map = NULL;
}

bool inflight_lost(const struct inflight_area *area)
{
    return area->map && guest_memory_watched_lost(area->sigbus_slot);
}

void *inflight_record(const struct inflight_area *area, uint32_t queue)
{
    return area->map && queue < area->queues ? area->base + (uint64_t)queue * area->ring_bytes : NULL;
}

static uint8_t *write_cache_of(const struct inflight_area *area)
{
    size_t at =
        area->packed ? offsetof(struct inflight_packed, write_cache) : offsetof(struct inflight_ring, write_cache);
    return area->map ? area->base + at : NULL;
}

void inflight_keep_write_cache(const struct inflight_area *area, bool write_cache)
{
    uint8_t *kept = write_cache_of(area);
    if (kept)
        WRITE_ONCE(*kept, write_cache ? INFLIGHT_CACHE_WRITEBACK : INFLIGHT_CACHE_WRITETHROUGH);
}

void inflight_write_cache(const struct inflight_area *area, bool *write_cache)
{
    const uint8_t *at = write_cache_of(area);
    uint8_t kept = at ? READ_ONCE(*at) : INFLIGHT_CACHE_UNKNOWN;
    if (kept == INFLIGHT_CACHE_WRITETHROUGH || kept == INFLIGHT_CACHE_WRITEBACK)
        *write_cache = kept == INFLIGHT_CACHE_WRITEBACK;
}

void inflight_taken(struct inflight_ring *r, uint16_t head, uint64_t counter)
{
    WRITE_ONCE(r->desc[head].counter, counter);
    in_program_order();
    WRITE_ONCE(r->desc[head].inflight, 1);
    in_program_order();
}

void inflight_answered(struct inflight_ring *r, uint16_t head)
{
    WRITE_ONCE(r->desc[head].next, READ_ONCE(r->last_batch_head));
    in_program_order();
    WRITE_ONCE(r->last_batch_head, head);
    in_program_order();
}

/* Clears the last "count" entries that were answered. */
static void clear_batch(struct inflight_ring *r, uint16_t count)
{
    uint16_t head = READ_ONCE(r->last_batch_head);
    for (; count > 0 && head < VS_MAX_QUEUE_SIZE; count--) {
        WRITE_ONCE(r->desc[head].inflight, 0);
        head = READ_ONCE(r->desc[head].next);
    }
}

void inflight_batch_done(struct inflight_ring *r, uint16_t count, uint16_t used_idx)
{
    in_program_order();
    clear_batch(r, count);
    in_program_order();
    WRITE_ONCE(r->used_idx, used_idx);
}

struct waiting {
    uint64_t counter;
    uint16_t head;
};

static int by_counter(const void *a, const void *b)
{
    uint64_t x = ((const struct waiting *)a)->counter, y = ((const struct waiting *)b)->counter;
    return x < y ? -1 : x > y;
}

uint32_t inflight_recover(struct inflight_ring *r, uint32_t num, uint16_t used_idx, uint16_t *heads, uint64_t *counter)
{
    struct waiting found[VS_MAX_QUEUE_SIZE];
    uint32_t count = 0;
    uint16_t behind;
    *counter = 0;
    if (READ_ONCE(r->version) != INFLIGHT_VERSION) {
        WRITE_ONCE(r->features, 0);
        WRITE_ONCE(r->desc_num, VS_MAX_QUEUE_SIZE);
        WRITE_ONCE(r->last_batch_head, 0);
        WRITE_ONCE(r->used_idx, used_idx);
        in_program_order();
        WRITE_ONCE(r->version, INFLIGHT_VERSION);
        return 0;
    }
    behind = (uint16_t)(used_idx - READ_ONCE(r->used_idx));
    if (behind <= num)
        clear_batch(r, behind);
    in_program_order();
    WRITE_ONCE(r->used_idx, used_idx);
    for (uint32_t head = 0; head < num; head++) {
        if (READ_ONCE(r->desc[head].inflight) != 1)
            continue;
        found[count].head = (uint16_t)head;
        found[count].counter = READ_ONCE(r->desc[head].counter);
        if (found[count].counter >= *counter)
            *counter = found[count].counter + 1;
        count++;
    }
    qsort(found, count, sizeof found[0], by_counter);
    for (uint32_t i = 0; i < count; i++)
        heads[i] = found[i].head;
    return count;
}
