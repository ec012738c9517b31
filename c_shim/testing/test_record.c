/* SPDX-License-Identifier: Apache-2.0
 *
 * Notes in one order what several test disks do and how a bitmap's file changes (test_record.h).
 *
 * The lock orders everything: what a disk does is noted while the disk's own
 * lock is held, at the moment at which it takes effect.
 *
 * The bitmap's file is mapped, and compared with what it was before each entry:
 * so each entry stands behind the pages as they were at most one entry before
 * it. Pages that change twice between two entries show their last content only.
 */
#include "test_record.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "bitmap_file.h"
#include "testing.h"

#define PAGE_BYTES 4096u

struct vs_test_record {
    pthread_mutex_t lock;
    struct vs_test_moment *moment;
    uint64_t count, capacity;
    uint64_t sync_begun; /* the engine's, which are one after the other */
    uint8_t *map, *seen; /* the bitmap's file now, and at the last entry */
    uint64_t pages;
};

static struct vs_test_moment *append(vs_test_record *r, enum vs_test_moment_kind kind, uint64_t bytes)
{
    struct vs_test_moment *m;
    if (r->count == r->capacity) {
        r->capacity = r->capacity ? 2 * r->capacity : 1024;
        r->moment = checked(realloc(r->moment, r->capacity * sizeof *r->moment));
    }
    m = &r->moment[r->count++];
    *m = (struct vs_test_moment){.kind = kind, .length = bytes, .data = bytes ? checked(malloc(bytes)) : NULL};
    return m;
}

static void look_at_pages(vs_test_record *r)
{
    for (uint64_t page = 0; page < r->pages; page++) {
        uint8_t *now = r->map + page * PAGE_BYTES, *seen = r->seen + page * PAGE_BYTES;
        struct vs_test_moment *m;
        if (memcmp(now, seen, PAGE_BYTES) == 0)
            continue;
        memcpy(seen, now, PAGE_BYTES);
        m = append(r, VS_MOMENT_PAGE, PAGE_BYTES);
        m->offset = page * PAGE_BYTES;
        memcpy(m->data, seen, PAGE_BYTES);
    }
}

/* Both leave the lock held or take it held: an entry is whole when it is seen. */
static struct vs_test_moment *begin_moment(vs_test_record *r, enum vs_test_moment_kind kind, uint64_t bytes)
{
    pthread_mutex_lock(&r->lock);
    look_at_pages(r);
    return append(r, kind, bytes);
}

static uint64_t end_moment(vs_test_record *r)
{
    uint64_t place = r->count - 1;
    pthread_mutex_unlock(&r->lock);
    return place;
}

/* ---- the disks ------------------------------------------------------------ */

static void on_disk(struct vs_test_moment *m, uint32_t disk, uint64_t offset, uint64_t length, uint64_t stamp)
{
    m->disk = disk;
    m->offset = offset;
    m->length = length;
    m->stamp = stamp;
}

static uint8_t *with_data(vs_test_record *r, enum vs_test_moment_kind kind, uint32_t disk, uint64_t offset,
                          uint64_t length, uint64_t stamp)
{
    struct vs_test_moment *m = begin_moment(r, kind, length);
    uint8_t *data = m->data;
    on_disk(m, disk, offset, length, stamp);
    end_moment(r);
    return data;
}

uint8_t *test_record_write(vs_test_record *r, uint32_t disk, uint64_t offset, uint64_t length, uint64_t stamp)
{
    return with_data(r, VS_MOMENT_WRITE, disk, offset, length, stamp);
}

uint8_t *test_record_loaded(vs_test_record *r, uint32_t disk, uint64_t offset, uint64_t length)
{
    return with_data(r, VS_MOMENT_LOADED, disk, offset, length, 0);
}

uint8_t *test_record_forgot(vs_test_record *r, uint32_t disk, uint64_t offset, uint64_t length)
{
    return with_data(r, VS_MOMENT_FORGOT, disk, offset, length, 0);
}

void test_record_spoilt(vs_test_record *r, uint32_t disk, uint64_t offset, uint64_t length)
{
    on_disk(begin_moment(r, VS_MOMENT_SPOILT, 0), disk, offset, length, 0);
    end_moment(r);
}

void test_record_zero(vs_test_record *r, uint32_t disk, uint64_t offset, uint64_t length, uint64_t stamp)
{
    on_disk(begin_moment(r, VS_MOMENT_ZERO, 0), disk, offset, length, stamp);
    end_moment(r);
}

void test_record_flushed(vs_test_record *r, uint32_t disk, uint64_t stamp)
{
    on_disk(begin_moment(r, VS_MOMENT_FLUSHED, 0), disk, 0, 0, stamp);
    end_moment(r);
}

/* ---- the bitmap's file ------------------------------------------------------ */

int vs_test_record_file(vs_test_record *r, int fd)
{
    struct stat st;
    if (fstat(fd, &st) < 0 || st.st_size % PAGE_BYTES)
        return -1;
    pthread_mutex_lock(&r->lock);
    r->map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (r->map == MAP_FAILED)
        abort();
    r->seen = checked(calloc(1, (size_t)st.st_size));
    r->pages = (uint64_t)st.st_size / PAGE_BYTES;
    look_at_pages(r);
    pthread_mutex_unlock(&r->lock);
    return 0;
}

uint64_t vs_test_record_sync_begun(vs_test_record *r)
{
    begin_moment(r, VS_MOMENT_SYNC_BEGUN, 0);
    return end_moment(r);
}

void vs_test_record_synced(vs_test_record *r, uint64_t begun)
{
    begin_moment(r, VS_MOMENT_SYNCED, 0)->stamp = begun;
    end_moment(r);
}

static void engine_syncs(void *record, bool begun)
{
    vs_test_record *r = record;
    if (begun)
        r->sync_begun = vs_test_record_sync_begun(r);
    else
        vs_test_record_synced(r, r->sync_begun);
}

void vs_test_record_bitmap(vs_test_record *r, vs_bitmap *bitmap)
{
    bitmap->sync_watcher = r;
    bitmap->sync_seen = engine_syncs;
}

void vs_test_bitmap_slots(vs_bitmap *bitmap, uint32_t slots)
{
    bitmap->slots = slots;
}

/* ---- the test's side -------------------------------------------------------- */

vs_test_record *vs_test_record_new(void)
{
    vs_test_record *r = checked(calloc(1, sizeof *r));
    pthread_mutex_init(&r->lock, NULL);
    return r;
}

void vs_test_record_free(vs_test_record *r)
{
    for (uint64_t i = 0; i < r->count; i++)
        free(r->moment[i].data);
    free(r->moment);
    if (r->map)
        munmap(r->map, r->pages * PAGE_BYTES);
    free(r->seen);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

void vs_test_record_note(vs_test_record *r, uint64_t number)
{
    begin_moment(r, VS_MOMENT_NOTE, 0)->stamp = number;
    end_moment(r);
}

int vs_test_record_moment(vs_test_record *r, uint64_t place, struct vs_test_moment *out)
{
    bool there;
    pthread_mutex_lock(&r->lock);
    there = place < r->count;
    if (there)
        *out = r->moment[place];
    pthread_mutex_unlock(&r->lock);
    return there;
}
