/* SPDX-License-Identifier: Apache-2.0 */
#include "bitmap_file.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "harness.h"

#define REGION 4096u
#define EXTENT (1ull << 20)
/* Two blocks of bits, the second one with a part of a word at its end. */
#define REGIONS (BITMAP_BLOCK_WORDS * 64ull + 100)
#define CAPACITY (REGIONS * REGION)
#define WORDS (BITMAP_BLOCK_WORDS + 2)

static const struct vs_bitmap_shape shape = {CAPACITY, EXTENT, REGION, 16};

static struct vs_bitmap_names names(uint8_t uuid, uint8_t former, uint8_t boot)
{
    struct vs_bitmap_names n = {.known = former != 0};
    memset(n.uuid, uuid, sizeof n.uuid);
    memset(n.former_uuid, former, sizeof n.former_uuid);
    memset(n.pair, 9, sizeof n.pair);
    memset(n.boot, boot, sizeof n.boot);
    return n;
}

static int scratch(void)
{
    int fd = memfd_create("bitmap", MFD_CLOEXEC);
    CHECK(fd >= 0);
    return fd;
}

static int copy_of(int fd)
{
    int copy = scratch();
    struct stat st;
    CHECK_EQUAL(fstat(fd, &st), 0);
    uint8_t *bytes = malloc((size_t)st.st_size);
    CHECK_EQUAL(pread(fd, bytes, (size_t)st.st_size, 0), st.st_size);
    CHECK_EQUAL(pwrite(copy, bytes, (size_t)st.st_size, 0), st.st_size);
    free(bytes);
    return copy;
}

static vs_bitmap *opened(int fd, struct vs_bitmap_names n, int verdict)
{
    vs_bitmap *b = NULL;
    CHECK_EQUAL(vs_bitmap_open(fd, &shape, &n, &b), verdict);
    return b;
}

/* A file of this name that holds no bits, as after a full copy. */
static vs_bitmap *adopted(int fd, uint8_t uuid)
{
    vs_bitmap *b = opened(fd, names(0, 0, 1), VS_BITMAP_BLANK);
    for (uint64_t w = 0; w < WORDS; w++)
        bitmap_file_store(b, w, 0);
    b->names = names(uuid, 0, 1);
    bitmap_file_put_header(b, false);
    return b;
}

static uint64_t bits(const vs_bitmap *b)
{
    uint64_t count = 0;
    for (uint64_t w = 0; w < WORDS; w++)
        count += (uint64_t)__builtin_popcountll(bitmap_file_word(b, w));
    return count;
}

static void write_log(vs_bitmap *b, const uint64_t *extents, uint64_t count)
{
    memcpy(bitmap_file_log_extents(b), extents, count * 8);
    uint64_t at = bitmap_file_log_seal(b, count);
    CHECK_EQUAL(pwrite(b->fd, b->log_buffer, b->log_bytes, (off_t)at), b->log_bytes);
    bitmap_file_log_written(b);
}

static void a_new_file_knows_nothing(void)
{
    int fd = scratch();
    vs_bitmap *b = opened(fd, names(1, 0, 1), VS_BITMAP_BLANK);
    struct stat st;
    CHECK_EQUAL(bits(b), REGIONS);
    CHECK_EQUAL(fstat(fd, &st), 0);
    CHECK_EQUAL((uint64_t)st.st_size, b->bytes);
    bitmap_file_store(b, 1, 5); /* of a block that was never written: all else stays set */
    CHECK_EQUAL(bitmap_file_word(b, 1), 5);
    CHECK_EQUAL(bits(b), REGIONS - 62);
    CHECK_EQUAL(vs_bitmap_close(b, 0), 0);
}

static void a_kill_loses_no_bit(void)
{
    int fd = scratch(), again;
    vs_bitmap *b = adopted(fd, 1);
    bitmap_file_store(b, 3, 0x70);
    bitmap_file_store(b, WORDS - 1, 1);
    again = copy_of(fd); /* what the page cache holds */
    vs_bitmap_close(b, 0);
    b = opened(again, names(2, 1, 1), VS_BITMAP_VALID);
    CHECK_EQUAL(bitmap_file_word(b, 3), 0x70);
    CHECK_EQUAL(bits(b), 4);
    vs_bitmap_close(b, 0);
}

/* A crash of the host: the log of "extents" is on the disk, and other bits than those of the page cache. */
static uint64_t bits_after_a_host_crash(const uint64_t *extents, uint64_t count)
{
    vs_bitmap *b = adopted(scratch(), 1);
    write_log(b, extents, count);
    int again = copy_of(b->fd);
    uint64_t found;
    vs_bitmap_close(b, 0);
    b = opened(again, names(2, 1, 77), VS_BITMAP_VALID);
    for (uint64_t i = 0; i < count; i++)
        for (uint64_t r = 0; r < EXTENT / REGION && extents[i] * (EXTENT / REGION) + r < REGIONS; r++) {
            uint64_t region = extents[i] * (EXTENT / REGION) + r;
            CHECK(bitmap_file_word(b, region / 64) >> region % 64 & 1);
        }
    found = bits(b);
    vs_bitmap_close(b, 0);
    return found;
}

static void after_a_host_crash_what_was_active_is_set(void)
{
    const uint64_t some[] = {0, 5, (CAPACITY - 1) / EXTENT};
    CHECK_EQUAL(bits_after_a_host_crash(some, 0), 0);
    CHECK_EQUAL(bits_after_a_host_crash(some, 2), 2 * EXTENT / REGION);
    CHECK_EQUAL(bits_after_a_host_crash(some, 3),
                2 * EXTENT / REGION + (CAPACITY - some[2] * EXTENT + REGION - 1) / REGION);
}

/* What the file holds after its newer copy of the log was written in part: the sectors from "whole" on are old. */
static void the_newer_whole_log_counts(void)
{
    const uint64_t one[] = {1}, two[] = {2};
    for (int torn = 0; torn < 2; torn++) {
        vs_bitmap *b = adopted(scratch(), 1);
        write_log(b, one, 1);
        uint64_t at = (1 + b->bit_blocks) * BITMAP_BLOCK_BYTES + (b->log_sequence + 1) % 2 * b->log_bytes;
        uint8_t *old = malloc(b->log_bytes);
        CHECK_EQUAL(pread(b->fd, old, b->log_bytes, (off_t)at), b->log_bytes);
        write_log(b, two, 1);
        if (torn)
            CHECK_EQUAL(pwrite(b->fd, old + 512, 512, (off_t)at + 512), 512);
        free(old);
        int again = copy_of(b->fd);
        vs_bitmap_close(b, 0);
        b = opened(again, names(2, 1, 77), VS_BITMAP_VALID);
        CHECK_EQUAL(bitmap_file_word(b, EXTENT / REGION / 64), torn ? ~0ull : 0);
        CHECK_EQUAL(bitmap_file_word(b, 2 * EXTENT / REGION / 64), torn ? 0 : ~0ull);
        vs_bitmap_close(b, 0);
    }
}

static void without_a_whole_log_all_is_set(void)
{
    vs_bitmap *b = adopted(scratch(), 1);
    uint64_t at = (1 + b->bit_blocks) * BITMAP_BLOCK_BYTES;
    for (int copy = 0; copy < 2; copy++)
        CHECK_EQUAL(pwrite(b->fd, "rubbish", 8, (off_t)(at + (unsigned)copy * b->log_bytes)), 8);
    int again = copy_of(b->fd);
    vs_bitmap_close(b, 0);
    b = opened(again, names(2, 1, 77), VS_BITMAP_VALID);
    CHECK_EQUAL(bits(b), REGIONS);
    vs_bitmap_close(b, 0);
}

static void a_clean_end_needs_no_log(void)
{
    const uint64_t one[] = {1};
    int fd = scratch(), again = dup(fd);
    vs_bitmap *b = adopted(fd, 1);
    write_log(b, one, 1);
    bitmap_file_store(b, 0, 2);
    CHECK_EQUAL(vs_bitmap_close(b, 1), 0);
    b = opened(again, names(2, 1, 77), VS_BITMAP_VALID);
    CHECK_EQUAL(bits(b), 1);
    again = copy_of(b->fd);
    vs_bitmap_close(b, 0);
    b = opened(again, names(3, 2, 78), VS_BITMAP_VALID); /* open() has taken the flag away, and dropped the log */
    CHECK_EQUAL(bits(b), 1);
    vs_bitmap_close(b, 0);
}

static void another_geometry_of_the_log(void)
{
    const uint64_t far[] = {(CAPACITY - 1) / EXTENT};
    struct vs_bitmap_shape other = shape;
    struct vs_bitmap_names n = names(2, 1, 77);
    vs_bitmap *b = adopted(scratch(), 1);
    write_log(b, far, 1);
    int again = copy_of(b->fd);
    uint64_t expect = (CAPACITY - far[0] * EXTENT + REGION - 1) / REGION;
    vs_bitmap_close(b, 0);
    other.al_extents = 2000;
    other.al_extent_bytes = 2 * EXTENT;
    CHECK_EQUAL(vs_bitmap_open(again, &other, &n, &b), VS_BITMAP_VALID);
    CHECK_EQUAL(bits(b), expect);
    again = copy_of(b->fd);
    vs_bitmap_close(b, 0);
    b = opened(again, names(3, 2, 78), VS_BITMAP_VALID); /* and back */
    CHECK_EQUAL(bits(b), expect);
    vs_bitmap_close(b, 0);
}

static void only_the_file_that_the_record_means(void)
{
    int fd = scratch();
    vs_bitmap *b = adopted(fd, 1), *none = NULL;
    int stale = copy_of(fd), other = copy_of(fd), smaller = copy_of(fd), version = copy_of(fd), cut = copy_of(fd);
    int former = copy_of(fd), unknown = copy_of(fd), foreign = scratch();
    struct vs_bitmap_names n = names(3, 1, 1);
    struct vs_bitmap_shape s = shape;
    vs_bitmap_close(b, 0);
    vs_bitmap_close(b = opened(stale, names(3, 2, 1), VS_BITMAP_STALE), 0);
    vs_bitmap_close(b = opened(unknown, names(3, 0, 1), VS_BITMAP_STALE), 0);
    n.pair[31] ^= 1;
    vs_bitmap_close(b = opened(other, n, VS_BITMAP_OTHER_DISKS), 0);
    n.pair[31] ^= 1;
    s.capacity_bytes -= REGION;
    CHECK_EQUAL(vs_bitmap_open(smaller, &s, &n, &b), VS_BITMAP_OTHER_SHAPE);
    CHECK_EQUAL(bitmap_file_word(b, 0), ~0ull);
    vs_bitmap_close(b, 0);
    CHECK_EQUAL(pwrite(version, "\2", 1, 8), 1);
    vs_bitmap_close(b = opened(version, n, VS_BITMAP_VERSION), 0);
    CHECK_EQUAL(ftruncate(cut, 8192), 0);
    b = opened(cut, n, VS_BITMAP_SHORT);
    CHECK_EQUAL(bits(b), REGIONS);
    vs_bitmap_close(b, 0);
    CHECK_EQUAL(pwrite(foreign, "root:x:0:0", 10, 0), 10);
    CHECK_EQUAL(vs_bitmap_open(foreign, &shape, &n, &none), VS_BITMAP_FOREIGN);
    CHECK(none == NULL);
    close(foreign);
    /* Renamed by a start that died before the record knew it. */
    b = opened(former, names(2, 1, 1), VS_BITMAP_VALID);
    former = copy_of(b->fd);
    vs_bitmap_close(b, 0);
    vs_bitmap_close(b = opened(former, names(4, 1, 1), VS_BITMAP_VALID), 0);
}

/* A file that is not believed begins anew, and an old log in it never counts again. */
static void an_old_log_does_not_come_back(void)
{
    const uint64_t old[] = {3}, now[] = {1};
    vs_bitmap *b = adopted(scratch(), 1);
    for (int i = 0; i < 50; i++)
        write_log(b, old, 1);
    int again = copy_of(b->fd);
    vs_bitmap_close(b, 0);
    b = opened(again, names(5, 4, 1), VS_BITMAP_STALE);
    for (uint64_t w = 0; w < WORDS; w++)
        bitmap_file_store(b, w, 0);
    b->names = names(5, 0, 1);
    bitmap_file_put_header(b, false);
    write_log(b, now, 1);
    again = copy_of(b->fd);
    vs_bitmap_close(b, 0);
    b = opened(again, names(6, 5, 77), VS_BITMAP_VALID);
    CHECK_EQUAL(bitmap_file_word(b, EXTENT / REGION / 64), ~0ull);
    CHECK_EQUAL(bits(b), EXTENT / REGION);
    vs_bitmap_close(b, 0);
}

/* Every byte of the file damaged in turn: never a bit less than there was, and most damage is local. */
static void every_byte_flipped(void)
{
    const uint64_t extents[] = {7};
    vs_bitmap *b = adopted(scratch(), 1);
    uint64_t want[WORDS], refused = 0;
    struct stat st;
    bitmap_file_store(b, 5, 0xff00);
    bitmap_file_store(b, WORDS - 2, 1ull << 63);
    write_log(b, extents, 1);
    for (uint64_t w = 0; w < WORDS; w++)
        want[w] = bitmap_file_word(b, w);
    for (uint64_t r = 7 * EXTENT / REGION; r < 8 * EXTENT / REGION; r++)
        want[r / 64] |= 1ull << r % 64;
    int whole = copy_of(b->fd), fd = scratch();
    vs_bitmap_close(b, 0);
    CHECK_EQUAL(fstat(whole, &st), 0);
    uint8_t *bytes = malloc((size_t)st.st_size);
    CHECK_EQUAL(pread(whole, bytes, (size_t)st.st_size, 0), st.st_size);
    for (int64_t at = 0; at < st.st_size; at++) {
        struct vs_bitmap_names n = names(2, 1, 77);
        int verdict;
        bytes[at] ^= (uint8_t)(1u << at % 8);
        CHECK_EQUAL(pwrite(fd, bytes, (size_t)st.st_size, 0), st.st_size);
        bytes[at] ^= (uint8_t)(1u << at % 8);
        verdict = vs_bitmap_open(dup(fd), &shape, &n, &b);
        CHECK(verdict >= 0 && verdict != VS_BITMAP_STALE);
        refused += verdict != VS_BITMAP_VALID;
        CHECK((verdict != VS_BITMAP_VALID) == (at < BITMAP_BLOCK_BYTES));
        if (verdict == VS_BITMAP_FOREIGN)
            continue;
        for (uint64_t w = 0; w < WORDS && verdict == VS_BITMAP_VALID; w++)
            CHECK((bitmap_file_word(b, w) & want[w]) == want[w]);
        vs_bitmap_close(b, 0);
    }
    CHECK_EQUAL(refused, BITMAP_BLOCK_BYTES);
    free(bytes);
    close(fd);
    close(whole);
}

/* Every torn state of one change: the word without the checksum, and the other way round. */
static void a_torn_change_sets_its_block(void)
{
    for (int half = 0; half < 2; half++) {
        vs_bitmap *b = adopted(scratch(), 1);
        uint64_t before[2], after[2];
        off_t sum_at = BITMAP_BLOCK_BYTES, word_at = BITMAP_BLOCK_BYTES + 16 + 8 * 5;
        pread(b->fd, &before[0], 8, sum_at);
        pread(b->fd, &before[1], 8, word_at);
        bitmap_file_store(b, 5, 1);
        pread(b->fd, &after[0], 8, sum_at);
        pread(b->fd, &after[1], 8, word_at);
        CHECK(before[0] != after[0] && before[1] != after[1]);
        CHECK_EQUAL(half ? pwrite(b->fd, &before[0], 8, sum_at) : pwrite(b->fd, &before[1], 8, word_at), 8);
        bitmap_file_store(b, 6, 3); /* a later change does not make it whole */
        int again = copy_of(b->fd);
        vs_bitmap_close(b, 0);
        b = opened(again, names(2, 1, 1), VS_BITMAP_VALID);
        CHECK_EQUAL(bits(b), BITMAP_BLOCK_WORDS * 64ull);
        vs_bitmap_close(b, 0);
    }
}

static void a_file_that_is_cut_while_it_is_used(void)
{
    int fd = scratch(), hand = dup(fd);
    vs_bitmap *b = adopted(fd, 1);
    CHECK(!bitmap_file_lost(b));
    CHECK_EQUAL(ftruncate(hand, 0), 0);
    bitmap_file_store(b, 9, 1);
    CHECK(bitmap_file_lost(b));
    CHECK(vs_bitmap_close(b, 1) < 0);
    close(hand);
}

int main(void)
{
    test("a_new_file_knows_nothing", a_new_file_knows_nothing);
    test("a_kill_loses_no_bit", a_kill_loses_no_bit);
    test("after_a_host_crash_what_was_active_is_set", after_a_host_crash_what_was_active_is_set);
    test("the_newer_whole_log_counts", the_newer_whole_log_counts);
    test("without_a_whole_log_all_is_set", without_a_whole_log_all_is_set);
    test("a_clean_end_needs_no_log", a_clean_end_needs_no_log);
    test("another_geometry_of_the_log", another_geometry_of_the_log);
    test("only_the_file_that_the_record_means", only_the_file_that_the_record_means);
    test("an_old_log_does_not_come_back", an_old_log_does_not_come_back);
    test("every_byte_flipped", every_byte_flipped);
    test("a_torn_change_sets_its_block", a_torn_change_sets_its_block);
    test("a_file_that_is_cut_while_it_is_used", a_file_that_is_cut_while_it_is_used);
    return tests_end();
}
