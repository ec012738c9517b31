/* SPDX-License-Identifier: Apache-2.0 */
#include "guest_memory.h"

#include <errno.h>
#include <fcntl.h>

#include "harness.h"
#include "ring.h"

#define PAGE 4096ull

static uint64_t gone_tokens[16];
static int gone_count;

static void on_gone(struct guest_memory *m, uint64_t token)
{
    (void)m;
    gone_tokens[gone_count++] = token;
}

static struct guest_memory begin_memory(void)
{
    struct guest_memory m;
    gone_count = 0;
    CHECK_EQUAL(guest_memory_init(&m, on_gone), 0);
    return m;
}

static int open_descriptors(void)
{
    int count = 0;
    for (int fd = 0; fd < 256; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

static void translation(void)
{
    struct guest g = guest_make(16 * PAGE);
    struct guest_memory m = begin_memory();
    struct vs_region r = guest_region(&g, 0, 16 * PAGE);
    int before = open_descriptors();
    CHECK_EQUAL(guest_memory_set(&m, &r, 1), 0);
    CHECK_EQUAL(open_descriptors(), before - 1);
    g.base[5] = 77;
    uint8_t *at = guest_at(m.current, GUEST_ADDR + 5, 1);
    CHECK(at && *at == 77);
    CHECK(guest_at_user(m.current, USER_ADDR + 5, 16 * PAGE - 5) == at);
    CHECK(guest_at(m.current, GUEST_ADDR, 16 * PAGE) == at - 5);
    CHECK(!guest_at(m.current, GUEST_ADDR, 16 * PAGE + 1));
    CHECK(!guest_at(m.current, GUEST_ADDR - 1, 1));
    CHECK(!guest_at(m.current, GUEST_ADDR + 16 * PAGE, 1));
    CHECK(!guest_at(m.current, 0, 1) && !guest_at(m.current, UINT64_MAX, 1));
    CHECK(!guest_at(m.current, GUEST_ADDR + 1, UINT64_MAX));
    CHECK(!guest_at(m.current, GUEST_ADDR, UINT64_MAX));
    CHECK(!guest_at_user(m.current, USER_ADDR - 1, 2));
    CHECK(!guest_at_user(m.current, USER_ADDR + 1, UINT64_MAX));
    CHECK(!guest_at_user(m.current, UINT64_MAX, 2));
    guest_memory_free(&m);
    guest_end(&g);
}

/* A range may cross from a region into the next; not into a gap. */
static void segments(void)
{
    struct guest g = guest_make(16 * PAGE);
    struct guest_memory m = begin_memory();
    struct vs_region r[3] = {guest_region(&g, 0, 4 * PAGE), guest_region(&g, 8 * PAGE, 2 * PAGE),
                             guest_region(&g, 4 * PAGE, 2 * PAGE)};
    struct iovec iov[4];
    CHECK_EQUAL(guest_memory_set(&m, r, 3), 0);
    CHECK_EQUAL(guest_iov(m.current, GUEST_ADDR + PAGE, PAGE, iov, 4), 1);
    CHECK_EQUAL(iov[0].iov_len, PAGE);
    CHECK_EQUAL(guest_iov(m.current, GUEST_ADDR + 4 * PAGE - 3, 10, iov, 4), 2);
    CHECK_EQUAL(iov[0].iov_len, 3);
    CHECK_EQUAL(iov[1].iov_len, 7);
    memcpy(g.base + 4 * PAGE - 3, "abcdefghij", 10);
    CHECK(memcmp(iov[0].iov_base, "abc", 3) == 0 && memcmp(iov[1].iov_base, "defghij", 7) == 0);
    CHECK(!guest_at(m.current, GUEST_ADDR + 4 * PAGE - 3, 10)); /* not one mapping */
    CHECK_EQUAL(guest_iov(m.current, GUEST_ADDR + 4 * PAGE - 3, 10, iov, 1), -1);
    CHECK_EQUAL(guest_iov(m.current, GUEST_ADDR, PAGE, iov, 0), -1);
    CHECK_EQUAL(guest_iov(m.current, GUEST_ADDR + 6 * PAGE - 3, 10, iov, 4), 0);  /* into the gap */
    CHECK_EQUAL(guest_iov(m.current, GUEST_ADDR + 10 * PAGE - 3, 10, iov, 4), 0); /* over the end */
    CHECK_EQUAL(guest_iov(m.current, GUEST_ADDR, UINT64_MAX, iov, 4), 0);
    CHECK_EQUAL(guest_iov(m.current, UINT64_MAX - 1, 100, iov, 4), 0);
    guest_memory_free(&m);
    guest_end(&g);
}

static int set_one(struct guest_memory *m, struct vs_region r)
{
    return guest_memory_set(m, &r, 1);
}

static void refused(void)
{
    struct guest g = guest_make(4 * PAGE);
    struct guest_memory m = begin_memory();
    struct vs_region good = guest_region(&g, 0, 4 * PAGE), r;
    int before = open_descriptors() - 1;
    CHECK_EQUAL(set_one(&m, good), 0);
    struct mem_table *table = m.current;
#define BAD(change, error)                     \
    do {                                       \
        r = guest_region(&g, 0, 4 * PAGE);     \
        change;                                \
        CHECK_EQUAL(set_one(&m, r), -(error)); \
    } while (0)
    BAD(r.bytes = 0, EINVAL);
    BAD(r.bytes = 4 * PAGE + 1, EINVAL);
    BAD(r.bytes = UINT64_MAX, EINVAL);
    BAD(r.mmap_offset = PAGE, EINVAL);
    BAD(r.mmap_offset = UINT64_MAX - 100, EINVAL);
    BAD(r.mmap_offset = INT64_MAX; r.bytes = 1, EINVAL);
    BAD(r.guest_addr = UINT64_MAX - PAGE, EINVAL);
    BAD(r.user_addr = UINT64_MAX - PAGE, EINVAL);
    BAD((close(r.fd), r.fd = -1), EBADF);
#undef BAD
    int pipe_ends[2];
    CHECK_EQUAL(pipe(pipe_ends), 0);
    r = guest_region(&g, 0, 4 * PAGE);
    close(r.fd);
    r.fd = pipe_ends[0];
    CHECK(set_one(&m, r) < 0);
    close(pipe_ends[1]);
    /* Two that overlap, and two of which the second is bad: nothing of them stays. */
    struct vs_region two[2] = {guest_region(&g, 0, 2 * PAGE), guest_region(&g, PAGE, 2 * PAGE)};
    CHECK_EQUAL(guest_memory_set(&m, two, 2), -EEXIST);
    two[0] = guest_region(&g, 0, PAGE);
    two[1] = guest_region(&g, PAGE, 4 * PAGE);
    CHECK_EQUAL(guest_memory_set(&m, two, 2), -EINVAL);
    r = guest_region(&g, PAGE, PAGE);
    CHECK_EQUAL(guest_memory_add(&m, &r), -EEXIST);
    CHECK(m.current == table && m.regions == 1);
    CHECK_EQUAL(open_descriptors(), before);
    CHECK_EQUAL(guest_memory_set(&m, NULL, 0), 0); /* an empty table is one */
    CHECK_EQUAL(m.regions, 0);
    guest_memory_free(&m);
    guest_end(&g);
}

/* libblkio shares a region that is no multiple of a page. */
static void odd_sizes(void)
{
    struct guest g = guest_make(0x3b10);
    struct guest_memory m = begin_memory();
    CHECK_EQUAL(set_one(&m, guest_region(&g, 0, 0x3b10)), 0);
    CHECK(guest_at(m.current, GUEST_ADDR + 0x3b0f, 1));
    CHECK(!guest_at(m.current, GUEST_ADDR + 0x3b0f, 2));
    CHECK_EQUAL(set_one(&m, guest_region(&g, 0x123, 0x1000)), 0); /* nor does it begin at one */
    g.base[0x123] = 9;
    uint8_t *at = guest_at(m.current, GUEST_ADDR + 0x123, 0x1000);
    CHECK(at && *at == 9);
    guest_memory_free(&m);
    guest_end(&g);
}

static void add_and_remove(void)
{
    struct guest g = guest_make(16 * PAGE);
    struct guest_memory m = begin_memory();
    struct vs_region r = guest_region(&g, 8 * PAGE, PAGE);
    CHECK_EQUAL(guest_memory_add(&m, &r), 0);
    for (uint64_t i = 0; i < 8; i++) {
        r = guest_region(&g, i * PAGE, PAGE);
        CHECK_EQUAL(guest_memory_add(&m, &r), 0);
    }
    CHECK_EQUAL(m.regions, 9);
    struct iovec iov[16];
    CHECK_EQUAL(guest_iov(m.current, GUEST_ADDR, 9 * PAGE, iov, 16), 9);
    /* What does not match in all is not there. */
    r = guest_region(&g, 3 * PAGE, PAGE);
    close(r.fd);
    r.fd = -1;
    struct vs_region other = r;
    other.bytes = PAGE / 2;
    CHECK_EQUAL(guest_memory_remove(&m, &other, 5), -ENOENT);
    other = r;
    other.user_addr++;
    CHECK_EQUAL(guest_memory_remove(&m, &other, 5), -ENOENT);
    CHECK_EQUAL(guest_memory_remove(&m, &r, 6), 0);
    CHECK_EQUAL(gone_count, 1);
    CHECK_EQUAL(gone_tokens[0], 6);
    CHECK_EQUAL(guest_memory_remove(&m, &r, 7), -ENOENT);
    CHECK_EQUAL(guest_iov(m.current, GUEST_ADDR, 9 * PAGE, iov, 16), 0);
    CHECK_EQUAL(guest_iov(m.current, GUEST_ADDR + 4 * PAGE, 5 * PAGE, iov, 16), 5);
    guest_memory_free(&m);
    guest_end(&g);
}

static void too_many(void)
{
    struct guest g = guest_make((VS_MAX_MEM_SLOTS + 1) * PAGE);
    struct guest_memory m = begin_memory();
    struct vs_region r;
    for (uint64_t i = 0; i < VS_MAX_MEM_SLOTS; i++) {
        r = guest_region(&g, i * PAGE, PAGE);
        CHECK_EQUAL(guest_memory_add(&m, &r), 0);
    }
    r = guest_region(&g, VS_MAX_MEM_SLOTS * PAGE, PAGE);
    CHECK_EQUAL(guest_memory_add(&m, &r), -ENOSPC);
    CHECK_EQUAL(m.regions, VS_MAX_MEM_SLOTS);
    guest_memory_free(&m);
    guest_end(&g);
}

/* A region stays mapped until the last request that was translated with it is over. */
static void pins(void)
{
    struct guest g = guest_make(4 * PAGE);
    struct guest_memory m = begin_memory();
    CHECK_EQUAL(set_one(&m, guest_region(&g, 0, 2 * PAGE)), 0);
    struct mem_table *first = mem_table_pin(&m), *again = mem_table_pin(&m);
    struct vs_region r = guest_region(&g, 2 * PAGE, 2 * PAGE);
    CHECK_EQUAL(guest_memory_add(&m, &r), 0);
    struct mem_table *second = mem_table_pin(&m);
    CHECK(second != first && again == first);
    uint8_t *at = guest_at(first, GUEST_ADDR, 1);
    r = guest_region(&g, 0, 2 * PAGE);
    CHECK_EQUAL(guest_memory_remove(&m, &r, 42), 0);
    CHECK(!guest_at(m.current, GUEST_ADDR, 1));
    *at = 3; /* still mapped */
    CHECK_EQUAL(g.base[0], 3);
    mem_table_unpin(&m, first);
    mem_table_unpin(&m, second);
    CHECK_EQUAL(gone_count, 0);
    mem_table_unpin(&m, again);
    CHECK_EQUAL(gone_count, 1);
    CHECK_EQUAL(gone_tokens[0], 42);
    CHECK_EQUAL(m.regions, 1);
    /* The same addresses again, while an old table with them is pinned. */
    first = mem_table_pin(&m);
    r = guest_region(&g, 2 * PAGE, 2 * PAGE);
    CHECK_EQUAL(guest_memory_remove(&m, &r, 43), 0);
    r = guest_region(&g, 2 * PAGE, 2 * PAGE);
    CHECK_EQUAL(guest_memory_add(&m, &r), 0);
    CHECK_EQUAL(m.regions, 2);
    mem_table_unpin(&m, first);
    CHECK_EQUAL(m.regions, 1);
    CHECK_EQUAL(gone_tokens[1], 43);
    guest_memory_free(&m);
    guest_end(&g);
}

/* A frontend that shrinks its memory ends its attachment, not the process. */
static void shrunk_memory(void)
{
    struct guest g = guest_make(4 * PAGE), other = guest_make(PAGE);
    struct guest_memory m = begin_memory(), n = begin_memory();
    guest_memory_catch_sigbus();
    CHECK_EQUAL(set_one(&m, guest_region(&g, 0, 4 * PAGE)), 0);
    CHECK_EQUAL(set_one(&n, guest_region(&other, 0, PAGE)), 0);
    volatile uint8_t *at = guest_at(m.current, GUEST_ADDR + 2 * PAGE, 1);
    CHECK_EQUAL(ftruncate(g.fd, PAGE), 0);
    CHECK(!guest_memory_lost(&m));
    *at = 1;
    CHECK(guest_memory_lost(&m));
    CHECK(!guest_memory_lost(&n));
    CHECK_EQUAL(guest_memory_set(&m, NULL, 0), 0);
    CHECK(!guest_memory_lost(&m));
    /* The same slot used anew is not lost. */
    CHECK_EQUAL(ftruncate(g.fd, 4 * PAGE), 0);
    CHECK_EQUAL(set_one(&m, guest_region(&g, 0, 4 * PAGE)), 0);
    CHECK(!guest_memory_lost(&m));
    guest_memory_free(&m);
    guest_memory_free(&n);
    guest_end(&g);
    guest_end(&other);
}

/* The handler of SIGBUS has so many places. A region without one could end the process: it is refused. */
static void unwatched_memory_is_refused(void)
{
    enum { MANY = VS_MAX_ATTACHMENTS + 1 };
    static struct guest_memory m[MANY];
    struct guest g = guest_make(PAGE);
    int before = open_descriptors(), rc = 0, given = 0;
    for (int i = 0; i < MANY; i++)
        m[i] = begin_memory();
    while (rc == 0 && given < MANY * VS_MAX_MEM_SLOTS) {
        struct vs_region r = guest_region(&g, 0, PAGE);
        r.guest_addr += (uint64_t)given * PAGE;
        rc = guest_memory_add(&m[given / VS_MAX_MEM_SLOTS], &r);
        given += rc == 0;
    }
    CHECK_EQUAL(rc, -ENOSPC);
    CHECK(given >= VS_MAX_ATTACHMENTS * VS_MAX_MEM_SLOTS); /* all that frontends may have at once fits */
    CHECK_EQUAL(open_descriptors(), before);
    guest_memory_free(&m[0]);
    m[0] = begin_memory();
    CHECK_EQUAL(set_one(&m[0], guest_region(&g, 0, PAGE)), 0);
    for (int i = 0; i < MANY; i++)
        guest_memory_free(&m[i]);
    guest_end(&g);
}

int main(void)
{
    test("translation", translation);
    test("segments", segments);
    test("refused tables leave the old one", refused);
    test("regions of odd sizes", odd_sizes);
    test("regions come and go", add_and_remove);
    test("too many regions", too_many);
    test("pins", pins);
    test("shrunk memory", shrunk_memory);
    test("unwatched memory is refused", unwatched_memory_is_refused);
    return tests_end();
}
