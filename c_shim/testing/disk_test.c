/* SPDX-License-Identifier: Apache-2.0
 *
 * A disk in memory with a volatile cache, for tests.
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
#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "disk.h"
#include "test_record.h"

struct version {
    struct version *older;
    uint64_t stamp;
    bool zero; /* then there is no data[] */
    bool lost; /* a buffered disk's flush failed with it: no later flush writes it */
    uint8_t data[];
};

struct block {
    struct list dirty_link; /* in "dirty" while there are versions */
    struct version *latest; /* NULL: the durable content is the latest */
    bool spoilt;            /* cannot be read until it is written */
};

struct fault {
    int error; /* 0: a short transfer */
    int skip;
    int count; /* still to fail; -1: for ever; 0: none */
};

struct held {
    struct disk_io **io;
    int count, capacity;
    bool on;
};

struct test_disk {
    struct vs_disk disk; /* first: the two share an address */
    pthread_mutex_t lock;
    int references;
    uint64_t stamp; /* of the last operation that took effect */
    uint8_t *durable;
    struct block *blocks;
    struct list dirty;
    struct held held[VS_DISK_KINDS];
    struct fault fault[VS_DISK_KINDS];
    uint64_t completed[VS_DISK_KINDS];
    vs_test_record *record; /* NULL: none */
    uint32_t record_number; /* what it is called there */
};

static struct test_disk *of(struct vs_disk *disk)
{
    return (struct test_disk *)disk;
}

static void *checked(void *memory)
{
    if (!memory)
        abort(); /* a test without memory has nothing to say */
    return memory;
}

/* ---- content ------------------------------------------------------------ */

static void add_version(struct test_disk *t, uint64_t number, const uint8_t *data)
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

static void free_chain(struct version *v)
{
    while (v) {
        struct version *older = v->older;
        free(v);
        v = older;
    }
}

static void fill(struct test_disk *t, uint8_t *to, uint64_t number, const struct version *v)
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
    list_each_safe(node, &t->dirty)
    {
        struct block *b = container_of(node, struct block, dirty_link);
        struct version **at = &b->latest;
        while (*at && ((*at)->stamp > stamp || (*at)->lost))
            at = &(*at)->older;
        if (!*at)
            continue;
        uint64_t number = (uint64_t)(b - t->blocks);
        fill(t, t->durable + number * t->disk.block_bytes, number, *at);
        free_chain(*at);
        *at = NULL;
        if (!b->latest)
            list_remove(&b->dirty_link);
    }
}

/* As the page cache does after a failed write-back: what was to be flushed counts as clean. */
static void lose(struct test_disk *t, uint64_t stamp)
{
    list_each(node, &t->dirty)
    {
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

/* What a power cut leaves of a block: any of its versions or, NULL, the durable content. */
static const struct version *survivor(const struct block *b, uint64_t number, uint64_t seed)
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
    uint64_t offset = io->offset + io->transferred;
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
    uint64_t number = (io->offset + io->transferred) / block_bytes;
    uint8_t one[4096], *recorded = record(t, io, bytes);
    for (uint64_t left = bytes; left; left -= block_bytes, number++) {
        if (io->kind == VS_DISK_ZERO) {
            add_version(t, number, NULL);
            continue;
        }
        if (io->kind == VS_DISK_READ)
            fill(t, one, number, t->blocks[number].latest);
        for (uint64_t done = 0; done < block_bytes;) {
            uint64_t part = block_bytes - done;
            if (part > io->iov->iov_len)
                part = io->iov->iov_len;
            if (io->kind == VS_DISK_READ)
                memcpy(io->iov->iov_base, one + done, part);
            else
                memcpy(one + done, io->iov->iov_base, part);
            disk_io_advance(io, part);
            done += part;
        }
        if (io->kind == VS_DISK_WRITE)
            add_version(t, number, one);
        if (recorded)
            recorded = (uint8_t *)memcpy(recorded, one, block_bytes) + block_bytes;
    }
    io->transferred += bytes;
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
    disk_all_data(io);
    io->data_at = end_of(t, io->offset, end, true);
    if (io->to_data_end && io->data_at == io->offset)
        io->data_end = end_of(t, io->offset, end, false);
}

/* The request takes effect; its result. A flush's "transferred" is the stamp at which it began. */
static int take_effect(struct test_disk *t, struct disk_io *io)
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
                lose(t, io->transferred);
            return -error;
        }
        make_durable(t, io->transferred);
        if (t->record)
            test_record_flushed(t->record, t->record_number, io->transferred);
        return 0;
    }
    if (io->kind == VS_DISK_READ && touches_spoilt(t, io))
        return -EIO;
    while (io->transferred < io->length) {
        uint64_t blocks = (io->length - io->transferred) / t->disk.block_bytes;
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
    struct test_disk *t = of(disk);
    struct held *h = &t->held[io->kind];
    int result = 0;
    if (io->kind == VS_DISK_READ || io->kind == VS_DISK_WRITE)
        assert(disk_iov_aligned(disk, io->iov, io->iov_count));
    pthread_mutex_lock(&t->lock);
    bool hold = h->on;
    if (io->kind == VS_DISK_FLUSH)
        io->transferred = t->stamp;
    if (hold) {
        if (h->count == h->capacity) {
            h->capacity = h->capacity ? 2 * h->capacity : 16;
            h->io = checked(realloc(h->io, (size_t)h->capacity * sizeof *h->io));
        }
        h->io[h->count++] = io;
    } else {
        result = take_effect(t, io);
    }
    pthread_mutex_unlock(&t->lock);
    if (!hold)
        disk_complete(io, result);
}

static void test_close(struct vs_disk *disk)
{
    for (int kind = 0; kind < VS_DISK_KINDS; kind++)
        assert(of(disk)->held[kind].count == 0);
    vs_test_disk_drop(disk);
}

static const struct disk_ops test_ops = {
    .submit = test_submit,
    .close = test_close,
};

/* ---- the test's side ---------------------------------------------------- */

vs_disk *vs_test_disk(uint64_t bytes, uint32_t logical_block_bytes)
{
    assert(logical_block_bytes >= 512 && logical_block_bytes <= 4096 && bytes % logical_block_bytes == 0);
    uint64_t count = bytes / logical_block_bytes;
    struct test_disk *t = checked(calloc(1, sizeof *t));
    disk_init(&t->disk, &test_ops, bytes, logical_block_bytes, logical_block_bytes,
              DISK_TELLS_EXTENTS | DISK_TELLS_SIZE | DISK_CLOSES_LATER);
    pthread_mutex_init(&t->lock, NULL);
    t->references = 1;
    t->durable = checked(calloc(1, bytes));
    t->blocks = checked(calloc(count, sizeof *t->blocks));
    list_init(&t->dirty);
    for (uint64_t i = 0; i < count; i++)
        list_init(&t->blocks[i].dirty_link);
    return &t->disk;
}

void vs_test_disk_buffered(vs_disk *disk)
{
    assert(!disk->host);
    disk->can |= DISK_FORGETS_FAILED_FLUSH;
}

void vs_test_disk_record(vs_disk *disk, vs_test_record *record, uint32_t number)
{
    struct test_disk *t = of(disk);
    pthread_mutex_lock(&t->lock);
    t->record = record;
    t->record_number = number;
    pthread_mutex_unlock(&t->lock);
}

void vs_test_disk_keep(vs_disk *disk)
{
    struct test_disk *t = of(disk);
    pthread_mutex_lock(&t->lock);
    t->references++;
    pthread_mutex_unlock(&t->lock);
}

void vs_test_disk_drop(vs_disk *disk)
{
    struct test_disk *t = of(disk);
    pthread_mutex_lock(&t->lock);
    assert(t->references > 0);
    int left = --t->references;
    pthread_mutex_unlock(&t->lock);
    if (left)
        return;
    list_each(node, &t->dirty)
        free_chain(container_of(node, struct block, dirty_link)->latest);
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
    struct test_disk *t = of(disk);
    assert(op < VS_DISK_KINDS);
    pthread_mutex_lock(&t->lock);
    t->held[op].on = hold != 0;
    pthread_mutex_unlock(&t->lock);
}

/* Those that are held now: not what the engine submits when the first of them completes. */
int vs_test_disk_release(vs_disk *disk, uint32_t op, int count)
{
    struct test_disk *t = of(disk);
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
        result[i] = take_effect(t, io[i]);
    }
    pthread_mutex_unlock(&t->lock);
    for (int i = 0; i < count; i++)
        disk_complete_remote(io[i], result[i]);
    free(io);
    free(result);
    return count;
}

int vs_test_disk_held(vs_disk *disk, uint32_t op)
{
    struct test_disk *t = of(disk);
    assert(op < VS_DISK_KINDS);
    pthread_mutex_lock(&t->lock);
    int count = t->held[op].count;
    pthread_mutex_unlock(&t->lock);
    return count;
}

void vs_test_disk_fault(vs_disk *disk, uint32_t op, int error, int skip, int count)
{
    struct test_disk *t = of(disk);
    assert(op < VS_DISK_KINDS && error >= 0);
    pthread_mutex_lock(&t->lock);
    t->fault[op] = (struct fault){.error = error, .skip = skip, .count = count};
    pthread_mutex_unlock(&t->lock);
}

void vs_test_disk_spoil(vs_disk *disk, uint64_t offset, uint64_t length)
{
    struct test_disk *t = of(disk);
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
    struct test_disk *t = of(disk);
    uint64_t bytes = disk->block_bytes;
    uint8_t *to = out;
    if (!inside(disk, offset, length))
        return -EINVAL;
    pthread_mutex_lock(&t->lock);
    for (uint64_t number = offset / bytes; number < (offset + length) / bytes; number++, to += bytes) {
        const struct block *b = &t->blocks[number];
        if (cut == 0)
            fill(t, to, number, b->latest);
        else if (cut == 1)
            fill(t, to, number, survivor(b, number, seed));
        else
            fill(t, to, number, NULL);
    }
    pthread_mutex_unlock(&t->lock);
    return 0;
}

int vs_test_disk_load(vs_disk *disk, uint64_t offset, uint64_t length, const void *bytes)
{
    struct test_disk *t = of(disk);
    if (!inside(disk, offset, length))
        return -EINVAL;
    pthread_mutex_lock(&t->lock);
    for (uint64_t number = offset / disk->block_bytes; number < (offset + length) / disk->block_bytes; number++) {
        struct block *b = &t->blocks[number];
        free_chain(b->latest);
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
    struct test_disk *t = of(disk);
    assert(op < VS_DISK_KINDS);
    pthread_mutex_lock(&t->lock);
    uint64_t count = t->completed[op];
    pthread_mutex_unlock(&t->lock);
    return count;
}
