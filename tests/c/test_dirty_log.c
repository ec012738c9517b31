/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include "dirty_log.h"
#include "harness.h"

#define PAGE DIRTY_LOG_PAGE_BYTES

static int file_of(uint64_t bytes)
{
    int fd = memfd_create("log", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
    return fd;
}

static void marks(void)
{
    struct dirty_log log = {.map = NULL};
    CHECK_EQUAL(dirty_log_map(&log, file_of(4096 + 4), 4, 4096), 0);
    dirty_log_mark(&log, 0, 1);
    dirty_log_mark(&log, PAGE - 1, 2);
    dirty_log_mark(&log, 9 * PAGE, 7 * PAGE);
    CHECK(log.bits[0] == 0x03 && log.bits[1] == 0xfe && log.bits[2] == 0 && log.bits[3] == 0);
    dirty_log_mark(&log, 32 * PAGE - 1, 1);
    CHECK(log.bits[3] == 0x80 && log.changed && !dirty_log_lost(&log));
    dirty_log_unmap(&log);
}

static void ends(void)
{
    const uint64_t beyond[][2] = {
        {32 * PAGE, 1}, {32 * PAGE - 1, 2}, {UINT64_MAX, 1}, {UINT64_MAX, 2}, {PAGE, UINT64_MAX}};
    for (unsigned i = 0; i < sizeof beyond / sizeof beyond[0]; i++) {
        struct dirty_log log = {.map = NULL};
        CHECK_EQUAL(dirty_log_map(&log, file_of(4096), 4, 0), 0);
        dirty_log_mark(&log, beyond[i][0], beyond[i][1]);
        CHECK(dirty_log_lost(&log) && !log.changed);
        for (unsigned k = 0; k < 4096; k++)
            CHECK_EQUAL(log.bits[k], 0);
        dirty_log_unmap(&log);
    }
}

static void files(void)
{
    struct dirty_log log = {.map = NULL};
    CHECK_EQUAL(dirty_log_map(&log, file_of(100), 100, 0), 0);
    uint8_t *first = log.bits;
    CHECK_EQUAL(dirty_log_map(&log, file_of(100), 101, 0), -EINVAL);
    CHECK_EQUAL(dirty_log_map(&log, file_of(100), 100, 1), -EINVAL);
    CHECK_EQUAL(dirty_log_map(&log, file_of(100), 0, 0), -EINVAL);
    CHECK_EQUAL(dirty_log_map(&log, file_of(100), UINT64_MAX, 2), -EINVAL);
    CHECK_EQUAL(dirty_log_map(&log, file_of(100), 2, UINT64_MAX), -EINVAL);
    CHECK_EQUAL(dirty_log_map(&log, -1, 100, 0), -EBADF);
    /* Sparse, and so cheap. */
    CHECK_EQUAL(dirty_log_map(&log, file_of(1ull << 40), DIRTY_LOG_BYTES_MAX + 1, 0), -EINVAL);
    CHECK(log.bits == first); /* the former one stays */
    dirty_log_unmap(&log);
}

static void marked_before(void)
{
    struct dirty_log log = {.map = NULL};
    dirty_log_mark(&log, 5 * PAGE, 1);
    CHECK_EQUAL(dirty_log_map(&log, file_of(64), 4, 0), 0);
    CHECK(log.bits[0] == 0xff && log.bits[3] == 0xff && log.bits[4] == 0);
    CHECK_EQUAL(dirty_log_map(&log, file_of(64), 4, 0), 0);
    CHECK(log.bits[0] == 0);
    dirty_log_unmap(&log);
}

static void by_host_address(void)
{
    static uint8_t low[2 * PAGE], high[PAGE];
    struct mem_region a = {.guest_addr = 3 * PAGE, .bytes = sizeof low, .host = low};
    struct mem_region b = {.guest_addr = 20 * PAGE + 512, .bytes = sizeof high, .host = high};
    struct mem_table table = {.count = 2, .region = {&a, &b}};
    struct dirty_log log = {.map = NULL};
    CHECK_EQUAL(dirty_log_map(&log, file_of(4), 4, 0), 0);
    dirty_log_mark_host(&log, &table, low + 2 * PAGE - 1, 1);
    CHECK(log.bits[0] == 0x10 && log.bits[2] == 0);
    dirty_log_mark_host(&log, &table, high, PAGE);
    CHECK(log.bits[0] == 0x10 && log.bits[2] == 0x30);
    dirty_log_unmap(&log);
}

static void shrunk(void)
{
    struct dirty_log log = {.map = NULL};
    int fd = file_of(4096), mine = dup(fd);
    guest_memory_catch_sigbus();
    CHECK_EQUAL(dirty_log_map(&log, fd, 4096, 0), 0);
    CHECK(!dirty_log_lost(&log) && ftruncate(mine, 0) == 0);
    dirty_log_mark(&log, 0, 1);
    CHECK(dirty_log_lost(&log));
    close(mine);
    dirty_log_unmap(&log);
}

/* The frontend takes marks away meanwhile: none is lost, and none of another page's comes back. */
#define ROUNDS 20000

static void *mark_one(void *arg)
{
    for (unsigned i = 0; i < ROUNDS; i++)
        dirty_log_mark(arg, 3 * PAGE, 1);
    return NULL;
}

static void two_at_once(void)
{
    struct dirty_log log = {.map = NULL};
    pthread_t other;
    CHECK_EQUAL(dirty_log_map(&log, file_of(8), 8, 0), 0);
    CHECK_EQUAL(pthread_create(&other, NULL, mark_one, &log), 0);
    for (unsigned i = 0; i < ROUNDS; i++) {
        __atomic_fetch_or(&log.bits[0], 0x20, __ATOMIC_SEQ_CST); /* another device's */
        CHECK(__atomic_exchange_n(&log.bits[0], 0, __ATOMIC_SEQ_CST) & 0x20);
    }
    pthread_join(other, NULL);
    dirty_log_mark(&log, 3 * PAGE, 1);
    CHECK_EQUAL(log.bits[0], 0x08);
    dirty_log_unmap(&log);
}

int main(void)
{
    test("which bits", marks);
    test("beyond the log", ends);
    test("logs within their files", files);
    test("marked before there was a log", marked_before);
    test("marked by the address here", by_host_address);
    test("a log that was shrunk", shrunk);
    test("two at once", two_at_once);
    return tests_end();
}
