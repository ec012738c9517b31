/* SPDX-License-Identifier: Apache-2.0
 *
 * The file of the dirty bitmap: what lies where in it, and why it can be believed after a crash.
 *
 * It consists of blocks of 4096 bytes:
 *
 *   0                 the control plane's: which disks the bitmap is about (bitmap.py); at its end, until when changes
 *                     of the disks are our own (heartbeat.c)
 *   1 .. 2a           two copies of the activity log, of a blocks each
 *   2a+1 ..           bit blocks: each has a head of 16 bytes, and the bits of 32640 regions
 *
 * After a SIGKILL: the bit blocks are mapped shared, so a store is in the page cache before the next instruction, and
 * the page cache outlives the process.
 *
 * Each bit block has a checksum in the same page, which can be brought up to date for one word alone: the exclusive or
 * of a mix of every word with its place. The word is stored first, then the checksum. If the process is killed between
 * the two, or a power cut tears the page, the checksum does not fit, and then all regions of the block count as
 * different. So a damaged block counts as dirty, never as clean. A hole (a page of zeroes) does not fit either.
 *
 * After a power cut the bits alone prove nothing: the kernel writes pages back when it likes, so bits that were set may
 * be missing. The activity log makes up for that: it names the extent of every such bit, and all regions of an extent
 * that it names count as different.
 *
 * Opening the file may block; the control plane does it off its loop. Nothing else here blocks.
 */
#include "bitmap_file.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "activity_file.h"
#include "guest_memory.h"

/* The largest request has to fit, and others beside it. */
#define DISCARD_BYTES_MAX ((uint64_t)VS_ZERO_SECTORS_MAX * 512)
#define BITMAP_MAGIC 0x7668734269744d31u /* "vhsBitM1" */

static struct bitmap_block *block_at(const struct vs_bitmap *b, uint64_t number)
{
    return (struct bitmap_block *)(b->map + number * BITMAP_BLOCK_BYTES);
}

static uint64_t checksum(const struct bitmap_block *block)
{
    uint64_t sum = bitmap_mix(BITMAP_BLOCK_WORDS, block->number);
    for (uint64_t i = 0; i < BITMAP_BLOCK_WORDS; i++)
        sum ^= bitmap_mix(i, block->words[i]);
    return sum;
}

static void fill_block(struct bitmap_block *block, uint64_t number, int byte)
{
    block->number = BITMAP_MAGIC + number;
    memset(block->words, byte, sizeof block->words);
    block->checksum = checksum(block);
}

void bitmap_store(void *bitmap, uint64_t word, uint64_t value)
{
    struct vs_bitmap *b = bitmap;
    uint64_t at = word % BITMAP_BLOCK_WORDS;
    struct bitmap_block *block = block_at(b, word / BITMAP_BLOCK_WORDS);
    volatile uint64_t *stored = &block->words[at], *sum = &block->checksum;
    uint64_t change = bitmap_mix(at, *stored) ^ bitmap_mix(at, value);
    *stored = value;
    *sum = *sum ^ change;
}

bool bitmap_lost(const struct vs_bitmap *b)
{
    return guest_memory_watched_lost(b->sigbus_slot);
}

bool bitmap_fits(const struct vs_bitmap *b, uint64_t capacity_bytes, uint32_t region_bytes)
{
    return b->shape.capacity_bytes == capacity_bytes && b->shape.region_bytes == region_bytes;
}

/* ---- opening ------------------------------------------------------------- */

static bool shape_ok(const struct vs_bitmap_shape *s)
{
    return s->capacity_bytes > 0 && s->region_bytes >= 4096 && s->region_bytes <= VS_DIRTY_REGION_BYTES_MAX &&
           (s->region_bytes & (s->region_bytes - 1)) == 0 &&
           s->capacity_bytes / s->region_bytes < VS_BITMAP_REGIONS_MAX && s->extents >= VS_EXTENTS_MIN &&
           s->extents <= VS_EXTENTS_MAX && s->extent_bytes >= s->region_bytes &&
           s->extent_bytes <= VS_EXTENT_BYTES_MAX && s->extents - 2 >= 2 * (DISCARD_BYTES_MAX / s->extent_bytes + 1) &&
           (s->extent_bytes & (s->extent_bytes - 1)) == 0 && s->capacity_bytes / s->extent_bytes < UINT32_MAX;
}

static void lay_out(struct vs_bitmap *b)
{
    uint64_t regions = (b->shape.capacity_bytes - 1) / b->shape.region_bytes + 1;
    b->words = (regions - 1) / 64 + 1;
    b->blocks = (b->words - 1) / BITMAP_BLOCK_WORDS + 1;
    b->log_bytes = activity_log_bytes(b->shape.extents);
    b->map_bytes = b->blocks * BITMAP_BLOCK_BYTES;
}

static uint64_t bits_offset(const struct vs_bitmap *b)
{
    return BITMAP_BLOCK_BYTES + 2 * b->log_bytes;
}

uint64_t vs_bitmap_file_bytes(const struct vs_bitmap_shape *shape)
{
    struct vs_bitmap b = {.shape = *shape};
    if (!shape_ok(shape))
        return 0;
    lay_out(&b);
    return bits_offset(&b) + b.map_bytes;
}

static void check_blocks(struct vs_bitmap *b)
{
    for (uint64_t i = 0; i < b->blocks; i++) {
        struct bitmap_block *block = block_at(b, i);
        if (block->number == BITMAP_MAGIC + i && block->checksum == checksum(block))
            continue;
        fill_block(block, i, 0xff);
        b->bad_blocks++;
    }
}

/* The machine went down: whatever was active then may differ. */
static int take_over_log(struct vs_bitmap *b, struct dirty_map *map)
{
    struct activity_list list;
    int rc = activity_log_read(b->fd, b, &list);
    if (rc == -EUCLEAN) { /* no copy is whole, which no power cut brings about: trust nothing */
        for (uint64_t i = 0; i < b->blocks; i++)
            fill_block(block_at(b, i), i, 0xff);
        b->bad_blocks = b->blocks;
        return 0;
    }
    if (rc < 0)
        return rc;
    for (uint32_t i = 0; i < list.count; i++) {
        uint64_t offset = list.extent[i] * b->shape.extent_bytes, length = b->shape.extent_bytes, before = map->dirty;
        if (offset >= b->shape.capacity_bytes)
            continue;
        if (length > b->shape.capacity_bytes - offset)
            length = b->shape.capacity_bytes - offset;
        dirty_map_set(map, offset, length);
        b->log_regions += map->dirty - before;
    }
    free(list.extent);
    return 0;
}

static int fill_from_log(struct vs_bitmap *b)
{
    struct dirty_map map;
    int rc = dirty_map_init(&map, b->shape.capacity_bytes, b->shape.region_bytes);
    if (rc < 0)
        return rc;
    bitmap_load(b, &map);
    map.stored = bitmap_store;
    map.keeper = b;
    rc = take_over_log(b, &map);
    dirty_map_free(&map);
    return rc;
}

static int prepare(struct vs_bitmap *b, enum vs_bitmap_open how)
{
    int rc = 0;
    if (how == VS_BITMAP_FRESH) {
        for (uint64_t i = 0; i < b->blocks; i++)
            fill_block(block_at(b, i), i, 0xff);
        rc = activity_log_clear(b->fd, b);
    } else {
        check_blocks(b);
        if (how == VS_BITMAP_AFTER_HOST_CRASH)
            rc = fill_from_log(b);
        else
            rc = activity_log_sequence(b->fd, b);
    }
    if (rc < 0)
        return rc;
    /* From here on the log may be begun anew: what it stood for is durable in the bits. */
    return fdatasync(b->fd) < 0 ? -errno : bitmap_lost(b) ? -EIO : 0;
}

int vs_bitmap_open(int fd, const struct vs_bitmap_shape *shape, enum vs_bitmap_open how, vs_bitmap **out)
{
    struct vs_bitmap *b;
    struct stat st;
    int rc;
    if (!shape_ok(shape))
        return -EINVAL;
    if (fstat(fd, &st) < 0)
        return -errno;
    if ((uint64_t)st.st_size < vs_bitmap_file_bytes(shape))
        return -EUCLEAN;
    b = calloc(1, sizeof *b);
    if (!b)
        return -ENOMEM;
    b->fd = fd;
    b->shape = *shape;
    b->slots = shape->extents;
    lay_out(b);
    b->map = mmap(NULL, b->map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)bits_offset(b));
    if (b->map == MAP_FAILED) {
        rc = -errno;
        free(b);
        return rc;
    }
    guest_memory_catch_sigbus();
    b->sigbus_slot = guest_memory_watch(b->map, b->map_bytes);
    rc = b->sigbus_slot < 0 ? -ENOSPC : prepare(b, how);
    if (rc < 0) {
        guest_memory_unwatch(b->sigbus_slot);
        munmap(b->map, b->map_bytes);
        free(b);
        return rc;
    }
    *out = b;
    return 0;
}

int bitmap_grow(struct vs_bitmap *b, uint64_t capacity_bytes)
{
    struct vs_bitmap larger = *b;
    struct stat st;
    larger.shape.capacity_bytes = capacity_bytes;
    if (!shape_ok(&larger.shape))
        return -EINVAL;
    lay_out(&larger);
    if (fstat(b->fd, &st) < 0)
        return -errno;
    if ((uint64_t)st.st_size < bits_offset(&larger) + larger.map_bytes)
        return -EUCLEAN;
    larger.map = mremap(b->map, b->map_bytes, larger.map_bytes, MREMAP_MAYMOVE);
    if (larger.map == MAP_FAILED)
        return -errno;
    guest_memory_unwatch(b->sigbus_slot);
    larger.sigbus_slot = guest_memory_watch(larger.map, larger.map_bytes);
    for (uint64_t i = b->blocks; i < larger.blocks; i++)
        fill_block(block_at(&larger, i), i, 0);
    *b = larger;
    return 0;
}

void bitmap_load(const struct vs_bitmap *b, struct dirty_map *into)
{
    uint64_t regions = into->regions;
    for (uint64_t word = 0; word < b->words; word++) {
        uint64_t value = block_at(b, word / BITMAP_BLOCK_WORDS)->words[word % BITMAP_BLOCK_WORDS];
        if (word == b->words - 1 && regions % 64)
            value &= (1ull << (regions % 64)) - 1; /* a block that was bad has bits beyond the last region */
        if (value)
            dirty_map_set_bits(into, word, value);
    }
}

void vs_bitmap_found(const vs_bitmap *b, uint64_t *bad_blocks, uint64_t *log_regions)
{
    *bad_blocks = b->bad_blocks;
    *log_regions = b->log_regions;
}

int vs_bitmap_close(vs_bitmap *b)
{
    int rc = fdatasync(b->fd) < 0 ? -errno : bitmap_lost(b) ? -EIO : 0;
    guest_memory_unwatch(b->sigbus_slot);
    munmap(b->map, b->map_bytes);
    close(b->fd);
    free(b);
    return rc;
}
