/* SPDX-License-Identifier: Apache-2.0
 *
 * What a test does to a test disk (testing_api.h), while an engine uses it or not.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "test_disk.h"
#include "testing.h"

vs_disk *vs_test_disk(uint64_t bytes, uint32_t logical_block_bytes)
{
    assert(logical_block_bytes >= 512 && logical_block_bytes <= 4096 && bytes % logical_block_bytes == 0);
    uint64_t count = bytes / logical_block_bytes;
    struct test_disk *t = checked(calloc(1, sizeof *t));
    disk_core->init(&t->disk, &test_disk_ops, bytes, logical_block_bytes, logical_block_bytes,
                    DISK_TELLS_EXTENTS | DISK_TELLS_SIZE | DISK_CLOSES_LATER);
    pthread_mutex_init(&t->lock, NULL);
    t->references = 1;
    t->durable = checked(calloc(1, bytes));
    t->blocks = checked(calloc(count, sizeof *t->blocks));
    list_init(&t->dirty);
    list_init(&t->late);
    for (uint64_t i = 0; i < count; i++)
        list_init(&t->blocks[i].dirty_link);
    return &t->disk;
}

void vs_test_disk_buffered(vs_disk *disk)
{
    assert(!disk->host);
    disk->can |= DISK_FORGETS_FAILED_FLUSH;
}

void vs_test_disk_remote(vs_disk *disk)
{
    assert(!disk->host);
    disk->can |= DISK_CAN_BE_CUT_OFF | DISK_IS_FAR;
}

void vs_test_disk_record(vs_disk *disk, vs_test_record *record, uint32_t number)
{
    struct test_disk *t = test_disk_of(disk);
    pthread_mutex_lock(&t->lock);
    t->record = record;
    t->record_number = number;
    pthread_mutex_unlock(&t->lock);
}

void vs_test_disk_keep(vs_disk *disk)
{
    struct test_disk *t = test_disk_of(disk);
    pthread_mutex_lock(&t->lock);
    t->references++;
    pthread_mutex_unlock(&t->lock);
}

void vs_test_disk_drop(vs_disk *disk)
{
    struct test_disk *t = test_disk_of(disk);
    pthread_mutex_lock(&t->lock);
    assert(t->references > 0);
    int left = --t->references;
    pthread_mutex_unlock(&t->lock);
    if (left)
        return;
    while (vs_test_disk_land(disk, 1, 0))
        ;
    list_each(node, &t->dirty)
        test_disk_free_chain(container_of(node, struct block, dirty_link)->latest);
    for (int kind = 0; kind < VS_DISK_KINDS; kind++)
        free(t->held[kind].io);
    free(t->blocks);
    free(t->durable);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

/* Ends the holding of further requests; those held stay until they are released. */
void vs_test_disk_hold(vs_disk *disk, uint32_t op, int hold)
{
    struct test_disk *t = test_disk_of(disk);
    assert(op < VS_DISK_KINDS);
    pthread_mutex_lock(&t->lock);
    t->held[op].on = hold != 0;
    pthread_mutex_unlock(&t->lock);
}

/* Those that are held now: not what the engine submits when the first of them completes. */
int vs_test_disk_release(vs_disk *disk, uint32_t op, int count)
{
    struct test_disk *t = test_disk_of(disk);
    struct held *h = &t->held[op];
    struct disk_io **io;
    int *result;
    assert(op < VS_DISK_KINDS);
    pthread_mutex_lock(&t->lock);
    if (count > h->count)
        count = h->count;
    io = checked(calloc((size_t)count + 1, sizeof *io));
    result = checked(calloc((size_t)count + 1, sizeof *result));
    for (int i = 0; i < count; i++) {
        io[i] = h->io[--h->count];
        result[i] = test_disk_take_effect(t, io[i]);
    }
    pthread_mutex_unlock(&t->lock);
    for (int i = 0; i < count; i++)
        disk_core->complete_remote(io[i], result[i]);
    free(io);
    free(result);
    return count;
}

int vs_test_disk_held(vs_disk *disk, uint32_t op)
{
    struct test_disk *t = test_disk_of(disk);
    assert(op < VS_DISK_KINDS);
    pthread_mutex_lock(&t->lock);
    int count = t->held[op].count;
    pthread_mutex_unlock(&t->lock);
    return count;
}

void vs_test_disk_fault(vs_disk *disk, uint32_t op, int error, int skip, int count)
{
    struct test_disk *t = test_disk_of(disk);
    assert(op < VS_DISK_KINDS && error >= 0);
    pthread_mutex_lock(&t->lock);
    t->fault[op] = (struct fault){.error = error, .skip = skip, .count = count};
    pthread_mutex_unlock(&t->lock);
}

void vs_test_disk_spoil(vs_disk *disk, uint64_t offset, uint64_t length)
{
    struct test_disk *t = test_disk_of(disk);
    assert(offset <= disk->bytes && length <= disk->bytes - offset);
    pthread_mutex_lock(&t->lock);
    for (uint64_t at = offset; at < offset + length; at += disk->block_bytes)
        t->blocks[at / disk->block_bytes].spoilt = true;
    if (t->record && length)
        test_record_spoilt(t->record, t->record_number, offset, length);
    pthread_mutex_unlock(&t->lock);
}

static bool inside(const struct vs_disk *disk, uint64_t offset, uint64_t length)
{
    return offset % disk->block_bytes == 0 && length % disk->block_bytes == 0 && offset <= disk->bytes &&
           length <= disk->bytes - offset;
}

int vs_test_disk_read(vs_disk *disk, uint64_t offset, uint64_t length, int cut, uint64_t seed, void *out)
{
    struct test_disk *t = test_disk_of(disk);
    uint64_t bytes = disk->block_bytes;
    uint8_t *to = out;
    if (!inside(disk, offset, length))
        return -EINVAL;
    pthread_mutex_lock(&t->lock);
    for (uint64_t number = offset / bytes; number < (offset + length) / bytes; number++, to += bytes) {
        const struct block *b = &t->blocks[number];
        if (cut == 0)
            test_disk_fill(t, to, number, b->latest);
        else if (cut == 1)
            test_disk_fill(t, to, number, test_disk_survivor(b, number, seed));
        else
            test_disk_fill(t, to, number, NULL);
    }
    pthread_mutex_unlock(&t->lock);
    return 0;
}

int vs_test_disk_load(vs_disk *disk, uint64_t offset, uint64_t length, const void *bytes)
{
    struct test_disk *t = test_disk_of(disk);
    if (!inside(disk, offset, length))
        return -EINVAL;
    pthread_mutex_lock(&t->lock);
    for (uint64_t number = offset / disk->block_bytes; number < (offset + length) / disk->block_bytes; number++) {
        struct block *b = &t->blocks[number];
        test_disk_free_chain(b->latest);
        b->latest = NULL;
        list_remove(&b->dirty_link);
    }
    memcpy(t->durable + offset, bytes, length);
    if (t->record && length)
        memcpy(test_record_loaded(t->record, t->record_number, offset, length), bytes, length);
    pthread_mutex_unlock(&t->lock);
    return 0;
}

uint64_t vs_test_disk_count(vs_disk *disk, uint32_t op)
{
    struct test_disk *t = test_disk_of(disk);
    assert(op < VS_DISK_KINDS);
    pthread_mutex_lock(&t->lock);
    uint64_t count = t->completed[op];
    pthread_mutex_unlock(&t->lock);
    return count;
}
