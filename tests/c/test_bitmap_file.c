/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include "activity_log.h"
#include "bitmap_image.h"

#define EXTENT_REGIONS (IMAGE_EXTENT / IMAGE_REGION)

struct verdict {
    uint64_t dirty, bad_blocks, log_regions;
};

/* What an open finds. Closes it again. */
static struct verdict look(const struct image *m, enum vs_bitmap_open how)
{
    struct verdict v;
    struct dirty_map map;
    vs_bitmap *b;
    CHECK_EQUAL(image_open(m, how, &b), 0);
    image_load(b, &map);
    v.dirty = map.dirty;
    vs_bitmap_found(b, &v.bad_blocks, &v.log_regions);
    dirty_map_free(&map);
    CHECK_EQUAL(vs_bitmap_close(b), 0);
    return v;
}

static void a_new_file_knows_nothing(void)
{
    struct image m = image_make(); /* zeroes: a hole is no block that says "clean" */
    struct verdict v = look(&m, VS_BITMAP_SAME_BOOT);
    CHECK_EQUAL(v.dirty, IMAGE_REGIONS);
    CHECK_EQUAL(v.bad_blocks, IMAGE_BLOCKS);
    v = look(&m, VS_BITMAP_FRESH);
    CHECK_EQUAL(v.dirty, IMAGE_REGIONS);
    CHECK_EQUAL(v.bad_blocks, 0);
    for (unsigned i = 0; i < IMAGE_BLOCKS; i++)
        CHECK(image_block_whole(&m, i));
    CHECK(image_log_whole(m.log[0]) && image_log_whole(m.log[1]));
    image_end(&m);
}

/* What is stored is in the page cache, with a checksum that fits, before anything else happens. */
static void a_kill_loses_no_bit(void)
{
    struct image m = image_make();
    struct dirty_map map;
    vs_bitmap *b;
    image_fill(&m);
    CHECK_EQUAL(image_open(&m, VS_BITMAP_SAME_BOOT, &b), 0);
    image_load(b, &map);
    CHECK_EQUAL(map.dirty, 0);
    map.stored = bitmap_store;
    map.keeper = b;
    dirty_map_set(&map, 3 * IMAGE_REGION, 1);
    dirty_map_set(&map, IMAGE_CAPACITY - 1, 1);
    CHECK_EQUAL(m.block[0].words[0], 8);
    CHECK_EQUAL(look(&m, VS_BITMAP_SAME_BOOT).dirty, 2); /* as a second process finds it */
    CHECK_EQUAL(look(&m, VS_BITMAP_SAME_BOOT).bad_blocks, 0);
    dirty_map_clear(&map, 3 * IMAGE_REGION, IMAGE_REGION);
    CHECK_EQUAL(look(&m, VS_BITMAP_SAME_BOOT).dirty, 1);
    dirty_map_free(&map);
    CHECK_EQUAL(vs_bitmap_close(b), 0);
    image_end(&m);
}

/* The word is there and its checksum is not, as after a kill between the two; or any one bit is another. */
static void a_torn_word_makes_its_block_differ_and_no_other(void)
{
    uint64_t seed = 1;
    for (int i = 0; i < 200; i++) {
        struct image m = image_make();
        uint64_t bit = test_random(&seed) % (BITMAP_BLOCK_BYTES * 8);
        image_fill(&m);
        image_set(&m, 7, 0xf0);
        ((uint8_t *)m.block)[bit / 8] ^= (uint8_t)(1u << bit % 8);
        struct verdict v = look(&m, i % 2 ? VS_BITMAP_SAME_BOOT : VS_BITMAP_AFTER_HOST_CRASH);
        CHECK_EQUAL(v.dirty, BITMAP_BLOCK_WORDS * 64ull);
        CHECK_EQUAL(v.bad_blocks, 1);
        CHECK_EQUAL(look(&m, VS_BITMAP_SAME_BOOT).bad_blocks, 0); /* it was mended: all of it differs */
        CHECK_EQUAL(look(&m, VS_BITMAP_SAME_BOOT).dirty, BITMAP_BLOCK_WORDS * 64ull);
        image_end(&m);
    }
}

/* A block in another one's place has a checksum that fits; its number does not. */
static void a_block_in_the_wrong_place_is_bad(void)
{
    struct image m = image_make();
    image_fill(&m);
    memcpy(&m.block[1], &m.block[0], sizeof m.block[0]);
    struct verdict v = look(&m, VS_BITMAP_SAME_BOOT);
    CHECK_EQUAL(v.bad_blocks, 1);
    CHECK_EQUAL(v.dirty, 100); /* and no region beyond the disk */
    image_end(&m);
}

static void after_a_host_crash_what_was_active_differs(void)
{
    const uint64_t last = (IMAGE_CAPACITY - 1) / IMAGE_EXTENT;
    struct image m = image_make();
    image_fill(&m);
    m.log[0]->count = 3;
    m.log[0]->extent[0] = 0;
    m.log[0]->extent[1] = last;
    m.log[0]->extent[2] = last + 1; /* of a larger disk */
    image_log_seal(m.log[0]);
    CHECK_EQUAL(look(&m, VS_BITMAP_SAME_BOOT).dirty, 0); /* the page cache lives: the bits say it all */
    struct verdict v = look(&m, VS_BITMAP_AFTER_HOST_CRASH);
    CHECK_EQUAL(v.dirty, EXTENT_REGIONS + IMAGE_REGIONS - last * EXTENT_REGIONS);
    CHECK_EQUAL(v.log_regions, v.dirty);
    CHECK_EQUAL(look(&m, VS_BITMAP_SAME_BOOT).dirty, v.dirty); /* the bits have taken it over */
    image_end(&m);
}

/* The newer copy was being written when the power went: the older one, which was durable before, counts. */
static void a_torn_log_leaves_the_copy_before_it(void)
{
    for (unsigned whole = 0; whole < BITMAP_BLOCK_BYTES; whole += 512) {
        struct image m = image_make();
        struct image_log newer = {.magic = IMAGE_LOG_MAGIC, .sequence = 3, .count = 100};
        image_fill(&m);
        m.log[0]->count = 1;
        m.log[0]->extent[0] = 5;
        image_log_seal(m.log[0]); /* sequence 2 */
        for (unsigned i = 0; i < newer.count; i++)
            newer.extent[i] = 1;
        image_log_seal(&newer);
        memset(m.log[1], 0xee, sizeof newer);
        memcpy(m.log[1], &newer, whole);
        bool torn = whole < 4 * 8 + 100 * 8;
        struct verdict v = look(&m, VS_BITMAP_AFTER_HOST_CRASH);
        CHECK_EQUAL(v.dirty, EXTENT_REGIONS);
        CHECK_EQUAL(m.block[0].words[(torn ? 5 : 1) * EXTENT_REGIONS / 64], UINT64_MAX);
        image_end(&m);
    }
}

static void the_newer_of_two_logs_counts(void)
{
    for (uint64_t i = 0; i < 2; i++) {
        struct image m = image_make();
        image_fill(&m);
        for (unsigned k = 0; k < 2; k++) {
            m.log[k]->sequence = 10 + 2 * (k == i) - (k == 1);
            m.log[k]->count = 1 + (k == i);
            m.log[k]->extent[0] = 3;
            m.log[k]->extent[1] = 4;
            image_log_seal(m.log[k]);
        }
        CHECK_EQUAL(look(&m, VS_BITMAP_AFTER_HOST_CRASH).dirty, 2 * EXTENT_REGIONS);
        image_end(&m);
    }
}

static void without_any_whole_log_everything_differs(void)
{
    struct image m = image_make();
    image_fill(&m);
    m.log[0]->checksum ^= 1;
    m.log[1]->count = UINT64_MAX; /* and is not read beyond its block */
    struct verdict v = look(&m, VS_BITMAP_AFTER_HOST_CRASH);
    CHECK_EQUAL(v.dirty, IMAGE_REGIONS);
    CHECK_EQUAL(v.bad_blocks, IMAGE_BLOCKS);
    image_end(&m);
}

/* Where a process goes on, its first log is newer than all that there were. */
static void the_sequence_goes_on(void)
{
    const enum vs_bitmap_open hows[] = {VS_BITMAP_SAME_BOOT, VS_BITMAP_AFTER_HOST_CRASH};
    for (int i = 0; i < 2; i++) {
        struct image m = image_make();
        vs_bitmap *b;
        image_fill(&m);
        m.log[1]->sequence = 77;
        image_log_seal(m.log[1]);
        CHECK_EQUAL(image_open(&m, hows[i], &b), 0);
        CHECK_EQUAL(b->log_sequence, 77);
        CHECK_EQUAL(bitmap_log_offset(b, 78), BITMAP_BLOCK_BYTES); /* not over the copy that counts */
        CHECK_EQUAL(bitmap_log_offset(b, 77), 2 * BITMAP_BLOCK_BYTES);
        CHECK_EQUAL(vs_bitmap_close(b), 0);
        image_end(&m);
    }
}

/* The same process, a log of nothing: what was active before a clean end must not be found after a later crash. */
static void a_log_that_is_unreadable_is_begun_anew(void)
{
    struct image m = image_make();
    vs_bitmap *b;
    image_fill(&m);
    memset(m.log[0], 0xff, BITMAP_BLOCK_BYTES);
    memset(m.log[1], 0xff, BITMAP_BLOCK_BYTES);
    CHECK_EQUAL(image_open(&m, VS_BITMAP_SAME_BOOT, &b), 0);
    CHECK_EQUAL(vs_bitmap_close(b), 0);
    CHECK_EQUAL(look(&m, VS_BITMAP_AFTER_HOST_CRASH).dirty, 0);
    image_end(&m);
}

static void a_file_cut_short(void)
{
    struct image m = image_make();
    vs_bitmap *b;
    image_fill(&m);
    CHECK_EQUAL(image_open(&m, VS_BITMAP_SAME_BOOT, &b), 0);
    CHECK(!bitmap_lost(b));
    CHECK_EQUAL(ftruncate(m.fd, BITMAP_BLOCK_BYTES), 0);
    bitmap_store(b, 0, 1); /* SIGBUS, which is survived */
    CHECK(bitmap_lost(b));
    CHECK_EQUAL(vs_bitmap_close(b), -EIO);
    CHECK_EQUAL(image_open(&m, VS_BITMAP_SAME_BOOT, &b), -EUCLEAN);
    CHECK_EQUAL(image_open(&m, VS_BITMAP_FRESH, &b), -EUCLEAN);
    image_end(&m);
}

static void shapes_that_cannot_be(void)
{
    const struct vs_bitmap_shape good = image_shape;
    struct vs_bitmap_shape bad[9];
    for (int i = 0; i < 9; i++)
        bad[i] = good;
    bad[0].capacity_bytes = 0;
    bad[1].region_bytes = 2048;
    bad[2].region_bytes = 65536 + 4096;
    bad[3].extents = VS_EXTENTS_MIN - 1;
    bad[4].extents = VS_EXTENTS_MAX + 1;
    bad[5].extent_bytes = IMAGE_REGION / 2;
    bad[6].extent_bytes = 2ull * VS_EXTENT_BYTES_MAX;
    bad[7].capacity_bytes = UINT64_MAX;
    bad[8].extent_bytes = 1 << 20; /* the largest discard would not fit so few */
    CHECK(vs_bitmap_file_bytes(&good) > 0);
    for (int i = 0; i < 9; i++) {
        vs_bitmap *b;
        CHECK_EQUAL(vs_bitmap_file_bytes(&bad[i]), 0);
        CHECK_EQUAL(vs_bitmap_open(-1, &bad[i], VS_BITMAP_FRESH, &b), -EINVAL);
    }
}

int main(void)
{
    test("a new file knows nothing", a_new_file_knows_nothing);
    test("a kill loses no bit", a_kill_loses_no_bit);
    test("a torn word makes its block differ and no other", a_torn_word_makes_its_block_differ_and_no_other);
    test("a block in the wrong place is bad", a_block_in_the_wrong_place_is_bad);
    test("after a host crash what was active differs", after_a_host_crash_what_was_active_differs);
    test("a torn log leaves the copy before it", a_torn_log_leaves_the_copy_before_it);
    test("the newer of two logs counts", the_newer_of_two_logs_counts);
    test("without any whole log everything differs", without_any_whole_log_everything_differs);
    test("the sequence goes on", the_sequence_goes_on);
    test("a log that is unreadable is begun anew", a_log_that_is_unreadable_is_begun_anew);
    test("a file cut short", a_file_cut_short);
    test("shapes that cannot be", shapes_that_cannot_be);
    return tests_end();
}
