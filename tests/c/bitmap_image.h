/* SPDX-License-Identifier: Apache-2.0
 *
 * A bitmap's file as it lies on the disk, made and taken apart without the code
 * under test (but for its mixing function): for its tests and its fuzzer.
 */
#ifndef VS_TEST_BITMAP_IMAGE_H
#define VS_TEST_BITMAP_IMAGE_H

#include <sys/mman.h>
#include <unistd.h>

#include "bitmap_file.h"
#include "harness.h"

#define IMAGE_REGION 65536u
#define IMAGE_EXTENT (64ull << 20)
#define IMAGE_EXTENTS 64u
/* Two blocks of bits; the second one ends in the middle of a word, the disk in the middle of an extent. */
#define IMAGE_REGIONS (BITMAP_BLOCK_WORDS * 64ull + 100)
#define IMAGE_WORDS (BITMAP_BLOCK_WORDS + 2)
#define IMAGE_BLOCKS 2u
#define IMAGE_CAPACITY (IMAGE_REGIONS * IMAGE_REGION - 4096)
#define IMAGE_BITMAP_MAGIC 0x7668734269744d31u
#define IMAGE_LOG_MAGIC 0x766873416374694cu

static const struct vs_bitmap_shape image_shape = {.capacity_bytes = IMAGE_CAPACITY,
                                                   .extent_bytes = IMAGE_EXTENT,
                                                   .region_bytes = IMAGE_REGION,
                                                   .extents = IMAGE_EXTENTS};

struct image_log {
    uint64_t checksum, magic, sequence, count;
    uint64_t extent[BITMAP_BLOCK_WORDS - 2];
};
static_assert(sizeof(struct image_log) == BITMAP_BLOCK_BYTES, "one copy of a log of so few extents is a block");

/* One block each: the control plane's, two copies of the log (the even sequences first), the bits. */
struct image {
    int fd;
    uint64_t bytes;
    struct image_log *log[2];
    struct bitmap_block *block;
    uint8_t *map;
};

static inline struct image image_make(void)
{
    struct image m = {.fd = memfd_create("bitmap", MFD_CLOEXEC), .bytes = (3 + IMAGE_BLOCKS) * BITMAP_BLOCK_BYTES};
    CHECK_EQUAL(vs_bitmap_file_bytes(&image_shape), m.bytes);
    CHECK(m.fd >= 0 && ftruncate(m.fd, (off_t)m.bytes) == 0);
    m.map = mmap(NULL, m.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, m.fd, 0);
    CHECK(m.map != MAP_FAILED);
    for (int i = 0; i < 2; i++)
        m.log[i] = (struct image_log *)(void *)(m.map + (1u + (unsigned)i) * BITMAP_BLOCK_BYTES);
    m.block = (struct bitmap_block *)(void *)(m.map + 3 * BITMAP_BLOCK_BYTES);
    return m;
}

static inline void image_end(struct image *m)
{
    munmap(m->map, m->bytes);
    close(m->fd);
}

static inline uint64_t image_block_sum(const struct bitmap_block *b)
{
    uint64_t sum = bitmap_mix(BITMAP_BLOCK_WORDS, b->number);
    for (uint64_t i = 0; i < BITMAP_BLOCK_WORDS; i++)
        sum ^= bitmap_mix(i, b->words[i]);
    return sum;
}

static inline bool image_block_whole(const struct image *m, unsigned i)
{
    return m->block[i].number == IMAGE_BITMAP_MAGIC + i && m->block[i].checksum == image_block_sum(&m->block[i]);
}

static inline uint64_t image_log_sum(const struct image_log *l)
{
    uint64_t sum = bitmap_mix(0, l->magic) ^ bitmap_mix(1, l->sequence) ^ bitmap_mix(2, l->count);
    for (uint64_t i = 0; i < l->count; i++)
        sum ^= bitmap_mix(3 + i, l->extent[i]);
    return sum;
}

static inline bool image_log_whole(const struct image_log *l)
{
    return l->magic == IMAGE_LOG_MAGIC && l->count <= sizeof l->extent / 8 && l->checksum == image_log_sum(l);
}

static inline void image_log_seal(struct image_log *l)
{
    l->checksum = l->count <= sizeof l->extent / 8 ? image_log_sum(l) : 0;
}

/* The copy that counts after a crash of the host; NULL: none is whole. */
static inline const struct image_log *image_newest(const struct image *m)
{
    bool first = image_log_whole(m->log[0]), second = image_log_whole(m->log[1]);
    if (first && second)
        return m->log[m->log[1]->sequence > m->log[0]->sequence];
    return first ? m->log[0] : second ? m->log[1] : NULL;
}

/* A file in good order: nothing differs, nothing is active. */
static inline void image_fill(struct image *m)
{
    memset(m->map, 0, m->bytes);
    for (unsigned i = 0; i < IMAGE_BLOCKS; i++) {
        m->block[i].number = IMAGE_BITMAP_MAGIC + i;
        m->block[i].checksum = image_block_sum(&m->block[i]);
    }
    for (unsigned i = 0; i < 2; i++) {
        *m->log[i] = (struct image_log){.magic = IMAGE_LOG_MAGIC, .sequence = 2 - i};
        image_log_seal(m->log[i]);
    }
}

static inline void image_set(struct image *m, uint64_t word, uint64_t value)
{
    struct bitmap_block *b = &m->block[word / BITMAP_BLOCK_WORDS];
    b->words[word % BITMAP_BLOCK_WORDS] = value;
    b->checksum = image_block_sum(b);
}

/* Opens a copy of the descriptor, as the control plane does. */
static inline int image_open(const struct image *m, enum vs_bitmap_open how, vs_bitmap **out)
{
    int fd = dup(m->fd), rc;
    CHECK(fd >= 0);
    rc = vs_bitmap_open(fd, &image_shape, how, out);
    if (rc < 0)
        close(fd);
    return rc;
}

static inline void image_load(const vs_bitmap *b, struct dirty_map *into)
{
    CHECK_EQUAL(dirty_map_init(into, IMAGE_CAPACITY, IMAGE_REGION), 0);
    bitmap_load(b, into);
}

#endif
