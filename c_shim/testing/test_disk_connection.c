/* SPDX-License-Identifier: Apache-2.0
 *
 * A test disk as the disk of another machine: its connection may be lost. Then
 * it may have forgotten what was not flushed, for its server began anew; and
 * what was under way may be carried out later, for its server goes on with it.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "test_disk.h"
#include "testing.h"

void test_disk_keep_for_later(struct test_disk *t, const struct disk_io *io)
{
    size_t bytes = io->kind == VS_DISK_WRITE ? io->length : 0;
    struct late *late = checked(malloc(sizeof *late + bytes));
    late->offset = io->offset;
    late->length = io->length;
    late->zero = io->kind == VS_DISK_ZERO;
    for (size_t at = 0, i = 0; at < bytes; at += io->iov[i++].iov_len)
        memcpy(late->data + at, io->iov[i].iov_base, io->iov[i].iov_len);
    list_append(&t->late, &late->link);
}

/* What a power cut of the server leaves is all that there is. */
static void forget(struct test_disk *t, uint64_t seed)
{
    uint64_t bytes = t->disk.block_bytes;
    list_each_safe(node, &t->dirty) {
        struct block *b = container_of(node, struct block, dirty_link);
        uint64_t number = (uint64_t)(b - t->blocks);
        uint8_t *durable = t->durable + number * bytes;
        test_disk_fill(t, durable, number, test_disk_survivor(b, number, seed));
        test_disk_free_chain(b->latest);
        b->latest = NULL;
        list_remove(&b->dirty_link);
        if (t->record)
            memcpy(test_record_forgot(t->record, t->record_number, number * bytes, bytes), durable, bytes);
    }
}

static bool is_change(uint32_t op)
{
    return op == VS_DISK_WRITE || op == VS_DISK_ZERO;
}

/* Takes all that is held of this kind; what changes the disk may be carried out later. */
static void take_held(struct test_disk *t, uint32_t op, struct list *taken)
{
    struct held *h = &t->held[op];
    for (int i = 0; i < h->count; i++) {
        struct disk_io *io = h->io[i];
        io->work.unanswered = true;
        if (is_change(op))
            test_disk_keep_for_later(t, io);
        list_append(taken, &io->work.remote_link);
    }
    h->count = 0;
}

void vs_test_disk_cut(vs_disk *disk, uint64_t forget_seed)
{
    struct test_disk *t = test_disk_of(disk);
    struct list taken;
    struct list *node;
    list_init(&taken);
    pthread_mutex_lock(&t->lock);
    t->lost = true;
    t->disk.lost = true;
    for (uint32_t op = 0; op < VS_DISK_OPS; op++)
        take_held(t, op, &taken);
    if (forget_seed)
        forget(t, forget_seed);
    pthread_mutex_unlock(&t->lock);
    while ((node = list_pop(&taken)))
        disk_core->complete_remote(container_of(node, struct disk_io, work.remote_link), -ENOTCONN);
}

void vs_test_disk_connect(vs_disk *disk)
{
    struct test_disk *t = test_disk_of(disk);
    pthread_mutex_lock(&t->lock);
    t->lost = false;
    t->disk.lost = false;
    pthread_mutex_unlock(&t->lock);
}

static void carry_out(struct test_disk *t, const struct late *late)
{
    uint64_t bytes = t->disk.block_bytes;
    t->stamp++;
    if (t->record && late->zero)
        test_record_zero(t->record, t->record_number, late->offset, late->length, t->stamp);
    else if (t->record)
        memcpy(test_record_write(t->record, t->record_number, late->offset, late->length, t->stamp), late->data,
               late->length);
    for (uint64_t at = 0; at < late->length; at += bytes)
        test_disk_add_version(t, (late->offset + at) / bytes, late->zero ? NULL : late->data + at);
}

int vs_test_disk_land(vs_disk *disk, int count, int carried_out)
{
    struct test_disk *t = test_disk_of(disk);
    struct list *node;
    int landed = 0;
    pthread_mutex_lock(&t->lock);
    while (landed < count && (node = list_pop(&t->late))) {
        struct late *late = container_of(node, struct late, link);
        if (carried_out)
            carry_out(t, late);
        free(late);
        landed++;
    }
    pthread_mutex_unlock(&t->lock);
    return landed;
}
