/* SPDX-License-Identifier: Apache-2.0
 *
 * A disk in memory with a volatile cache, for tests: as the engine uses it. What
 * a test does to it is in test_disk_control.c.
 *
 * Every block has its durable content and a chain of the versions written
 * since, newest first, each with a stamp that grows with every operation that
 * takes effect. A flush notes the stamp when it is submitted; when it succeeds,
 * it makes durable, block by block, the newest version not younger than that,
 * and forgets what lies below. What took effect after the flush began is not in
 * it, even if the flush completes much later. A power cut may keep any version
 * of a chain, or the durable content.
 *
 * It is as unkind as a real disk may be: held requests are let go newest first,
 * a write that fails leaves its first half written, and buffers must be aligned
 * to a block.
 *
 * A failed flush makes nothing durable. A later one that succeeds does, unless
 * the disk is buffered: then the page cache has forgotten that it had to, and
 * what was unflushed then stays so for ever.
 *
 * Left out: a torn block.
 *
 * Threads: "lock" guards everything here but the struct vs_disk, which is the
 * engine's. A request that takes effect in submit() ends by disk_complete(), one
 * that a test lets go by disk_complete_remote(); neither with the lock held.
 * Each hand-over to an engine uses up one reference: vs_test_disk() returns the
 * first, vs_test_disk_keep() adds one, so that a kept disk can be attached anew.
 */
#include "test_disk.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "testing.h"

/* ---- content ------------------------------------------------------------ */

void test_disk_add_version(struct test_disk *t, uint64_t number, const uint8_t *data)
{
    struct block *b = &t->blocks[number];
    size_t bytes = data ? t->disk.block_bytes : 0;
    struct version *v = checked(malloc(sizeof *v + bytes));
    v->older = b->latest;
    v->stamp = t->stamp;
    v->zero = data == NULL;
    v->lost = false;
    if (data)
        memcpy(v->data, data, bytes);
    if (!b->latest)
        list_append(&t->dirty, &b->dirty_link);
    b->latest = v;
    b->spoilt = false;
}

void test_disk_free_chain(struct version *v)
{
    while (v) {
        struct version *older = v->older;
        free(v);
        v = older;
    }
}

void test_disk_fill(struct test_disk *t, uint8_t *to, uint64_t number, const struct version *v)
{
    size_t bytes = t->disk.block_bytes;
    if (!v)
        memcpy(to, t->durable + number * bytes, bytes);
    else if (v->zero)
        memset(to, 0, bytes);
    else
        memcpy(to, v->data, bytes);
}

/* All that took effect up to "stamp" becomes durable. */
static void make_durable(struct test_disk *t, uint64_t stamp)
{
    list_each_safe(node, &t->dirty) {
        struct block *b = container_of(node, struct block, dirty_link);
        struct version **at = &b->latest;
        while (*at && ((*at)->stamp > stamp || (*at)->lost))
            at = &(*at)->older;
        if (!*at)
            continue;
        uint64_t number = (uint64_t)(b - t->blocks);
        test_disk_fill(t, t->durable + number * t->disk.block_bytes, number, *at);
        test_disk_free_chain(*at);
        *at = NULL;
        if (!b->latest)
            list_remove(&b->dirty_link);
    }
}

/* As the page cache does after a failed write-back: what was to be flushed counts as clean. */
static void lose(struct test_disk *t, uint64_t stamp)
{
    list_each(node, &t->dirty) {
        for (struct version *v = container_of(node, struct block, dirty_link)->latest; v; v = v->older)
            v->lost |= v->stamp <= stamp;
    }
}

/* A mixing function with good low bits (the finaliser of splitmix64). */
static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

const struct version *test_disk_survivor(const struct block *b, uint64_t number, uint64_t seed)
{
    uint64_t versions = 0;
    for (const struct version *v = b->latest; v; v = v->older)
        versions++;
    uint64_t drop = mix(mix(seed) ^ number) % (versions + 1);
    const struct version *v = b->latest;
    while (drop--)
        v = v->older;
    return v;
}

static bool block_is_zero(struct test_disk *t, uint64_t number)
{
    const struct version *v = t->blocks[number].latest;
    const uint8_t *p = v ? v->data : t->durable + number * t->disk.block_bytes;
    if (v && v->zero)
        return true;
    return p[0] == 0 && memcmp(p, p + 1, t->disk.block_bytes - 1) == 0;
}

static bool touches_spoilt(const struct test_disk *t, const struct disk_io *io)
{
    for (uint64_t at = io->offset; at < io->offset + io->length; at += t->disk.block_bytes)
        if (t->blocks[at / t->disk.block_bytes].spoilt)
            return true;
    return false;
}

/* ---- requests ----------------------------------------------------------- */

/* Where the bytes of this part go to, if they are recorded. */
static uint8_t *record(struct test_disk *t, const struct disk_io *io, uint64_t bytes)
{
    uint64_t offset = io->offset + io->work.transferred;
    if (!t->record || !bytes)
        return NULL;
    if (io->kind == VS_DISK_ZERO)
        test_record_zero(t->record, t->record_number, offset, bytes, t->stamp);
    return io->kind == VS_DISK_WRITE ? test_record_write(t->record, t->record_number, offset, bytes, t->stamp) : NULL;
}

/* Moves "bytes" from or to the io's buffers, which may be cut anywhere, block by block. */
static void transfer(struct test_disk *t, struct disk_io *io, uint64_t bytes)
{
    uint64_t block_bytes = t->disk.block_bytes;
    uint64_t number = (io->offset + io->work.transferred) / block_bytes;
    uint8_t one[4096], *recorded = record(t, io, bytes);
    for (uint64_t left = bytes; left; left -= block_bytes, number++) {
        if (io->kind == VS_DISK_ZERO) {
            test_disk_add_version(t, number, NULL);
            continue;
        }
        if (io->kind == VS_DISK_READ)
            test_disk_fill(t, one, number, t->blocks[number].latest);
        for (uint64_t done = 0; done < block_bytes;) {
            uint64_t part = block_bytes - done;
            if (part > io->iov->iov_len)
                part = io->iov->iov_len;
            if (io->kind == VS_DISK_READ)
                memcpy(io->iov->iov_base, one + done, part);
            else
                memcpy(one + done, io->iov->iov_base, part);
            disk_core->io_advance(io, part);
            done += part;
        }
        if (io->kind == VS_DISK_WRITE)
            test_disk_add_version(t, number, one);
        if (recorded)
            recorded = (uint8_t *)memcpy(recorded, one, block_bytes) + block_bytes;
    }
    io->work.transferred += bytes;
}

/* Takes one fault of this kind: 0, or it happens and *error says which (0: short). */
static bool take_fault(struct test_disk *t, uint32_t kind, int *error)
{
    struct fault *f = &t->fault[kind];
    if (f->count == 0)
        return false;
    if (f->skip > 0) {
        f->skip--;
        return false;
    }
    if (f->count > 0)
        f->count--;
    *error = f->error;
    return true;
}

/* Where blocks hold zeroes (as if true) or not, from "at" on. */
static uint64_t end_of(struct test_disk *t, uint64_t at, uint64_t end, bool zero)
{
    uint64_t bytes = t->disk.block_bytes;
    while (at < end && block_is_zero(t, at / bytes) == zero)
        at = (at / bytes + 1) * bytes;
    return at < end ? at : end;
}

static void find_extent(struct test_disk *t, struct disk_io *io)
{
    uint64_t end = io->offset + io->length;
    disk_core->all_data(io);
    io->data_at = end_of(t, io->offset, end, true);
    if (io->to_data_end && io->data_at == io->offset)
        io->data_end = end_of(t, io->offset, end, false);
}

/* A flush's "transferred" is the stamp at which it began. */
int test_disk_take_effect(struct test_disk *t, struct disk_io *io)
{
    int error = 0;
    t->completed[io->kind]++;
    if (io->kind == VS_DISK_EXTENTS)
        find_extent(t, io);
    if (io->kind == VS_DISK_SIZE)
        io->size_bytes = t->disk.bytes;
    if (io->kind >= VS_DISK_OPS)
        return 0;
    t->stamp++;
    if (io->kind == VS_DISK_FLUSH) {
        if (take_fault(t, io->kind, &error) && error) {
            if (t->disk.can & DISK_FORGETS_FAILED_FLUSH)
                lose(t, io->work.transferred);
            return -error;
        }
        make_durable(t, io->work.transferred);
        if (t->record)
            test_record_flushed(t->record, t->record_number, io->work.transferred);
        return 0;
    }
    if (io->kind == VS_DISK_READ && touches_spoilt(t, io))
        return -EIO;
    while (io->work.transferred < io->length) {
        uint64_t blocks = (io->length - io->work.transferred) / t->disk.block_bytes;
        bool fault = take_fault(t, io->kind, &error);
        if (fault && error) {
            transfer(t, io, blocks / 2 * t->disk.block_bytes);
            return -error;
        }
        if (fault)
            blocks = (blocks + 1) / 2;
        transfer(t, io, blocks * t->disk.block_bytes);
    }
    return 0;
}

static void test_submit(struct vs_disk *disk, struct disk_io *io)
{
    struct test_disk *t = test_disk_of(disk);
    struct held *h = &t->held[io->kind];
    int result = 0;
    if (io->kind == VS_DISK_READ || io->kind == VS_DISK_WRITE)
        assert(disk_core->iov_aligned(disk, io->iov, io->iov_count));
    pthread_mutex_lock(&t->lock);
    if (t->lost && io->kind < VS_DISK_OPS) {
        pthread_mutex_unlock(&t->lock);
        disk_core->complete(io, -ENOTCONN); /* it was never sent */
        return;
    }
    bool hold = h->on;
    if (io->kind == VS_DISK_FLUSH)
        io->work.transferred = t->stamp;
    if (hold) {
        if (h->count == h->capacity) {
            h->capacity = h->capacity ? 2 * h->capacity : 16;
            h->io = checked(realloc(h->io, (size_t)h->capacity * sizeof *h->io));
        }
        h->io[h->count++] = io;
    } else {
        result = test_disk_take_effect(t, io);
    }
    pthread_mutex_unlock(&t->lock);
    if (!hold)
        disk_core->complete(io, result);
}

static void test_cut_off(struct vs_disk *disk)
{
    vs_test_disk_cut(disk, 0);
}

static void test_close(struct vs_disk *disk)
{
    for (int kind = 0; kind < VS_DISK_KINDS; kind++)
        assert(test_disk_of(disk)->held[kind].count == 0);
    vs_test_disk_drop(disk);
}

const struct disk_ops test_disk_ops = {
    .submit = test_submit,
    .cut_off = test_cut_off,
    .close = test_close,
};
