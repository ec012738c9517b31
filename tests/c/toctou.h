/* SPDX-License-Identifier: Apache-2.0
 *
 * What the tests with a guest that rewrites what it has handed over share: its memory, the secret beside it, pages that
 * nobody may touch, values that hurt, and the run itself. See test_toctou.c.
 */
#ifndef VS_TEST_TOCTOU_H
#define VS_TEST_TOCTOU_H

#include <pthread.h>

#include "rig.h"

#define SECRET 0xc5
#define FILE_BYTES (4u << 20)
#define LOW_AT 0x1230u
#define LOW_BYTES (0x200000u - 0x2468u)
#define HIGH_AT 0x200330u
#define HIGH_BYTES (0x1f0000u - 0x1357u)
#define RACED_LANES 2u

static const struct {
    uint64_t at, bytes;
} part[2] = {{LOW_AT, LOW_BYTES}, {HIGH_AT, HIGH_BYTES}};

/* A table of descriptors may be read 65535 * 16 bytes too far at most. */
#define GUARD_BYTES (2u << 20)

void *__real_mmap64(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap64(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);

void *__wrap_mmap64(void *at, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    uint8_t *room;
    if (at || fd < 0 || !(flags & MAP_SHARED))
        return __real_mmap64(at, bytes, protection, flags, fd, offset);
    /* What munmap leaves of it is address space only. */
    room = __real_mmap64(NULL, bytes + 2 * GUARD_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return room;
    return __real_mmap64(room + GUARD_BYTES, bytes, protection, flags | MAP_FIXED, fd, offset);
}

static bool in_a_region(uint64_t at)
{
    return (at >= LOW_AT && at < LOW_AT + LOW_BYTES) || (at >= HIGH_AT && at < HIGH_AT + HIGH_BYTES);
}

static void hide_secret(struct guest *g)
{
    for (uint64_t at = 0; at < g->bytes; at++)
        g->base[at] = in_a_region(at) ? 0x11 : SECRET;
}

static void check_secret(struct rig *r)
{
    static uint8_t content[DISK_BYTES];
    uint8_t secret[8];
    memset(secret, SECRET, sizeof secret);
    for (uint64_t at = 0; at < r->guest->bytes; at++)
        CHECK(in_a_region(at) || r->guest->base[at] == SECRET);
    CHECK_EQUAL(vs_test_disk_read(r->source, 0, DISK_BYTES, CUT_NONE, 1, content), 0);
    CHECK(!memmem(content, sizeof content, secret, sizeof secret));
}

static void set_table(struct rig *r)
{
    struct vs_command table = {.kind = VS_CMD_SET_MEM_TABLE, .attachment = r->attachment, .fd = -1, .memory.count = 2};
    for (unsigned i = 0; i < 2; i++)
        table.memory.region[i] = guest_region(r->guest, part[i].at, part[i].bytes);
    CHECK_EQUAL(rig_command(r, table), 0);
}

static void attach_guest(struct rig *r, uint64_t features)
{
    r->guest = malloc(sizeof *r->guest);
    CHECK(r->guest);
    *r->guest = guest_make(FILE_BYTES);
    hide_secret(r->guest);
    CHECK_EQUAL(rig_simple(r, VS_CMD_ATTACH, 0), 0);
    CHECK_EQUAL(rig_simple(r, VS_CMD_SET_FEATURES, features), 0);
    set_table(r);
}

/* ---- the thread that rewrites ----------------------------------------------- */

struct racer {
    pthread_t thread;
    void (*rewrite)(struct racer *x);
    uint64_t seed;
    atomic_bool stop;
    uint64_t stores;
};

static void *race(void *argument)
{
    struct racer *x = argument;
    while (!atomic_load_explicit(&x->stop, memory_order_relaxed))
        x->rewrite(x);
    return NULL;
}

static uint64_t pick(struct racer *x, uint64_t count)
{
    return test_random(&x->seed) % count;
}

/* Where it hurts: bytes that end (or begin) about where a region does, what is beside it, and anywhere. */
static uint64_t some_address(struct racer *x, uint32_t length)
{
    const uint64_t i = pick(x, 2), begin = part[i].at, end = part[i].at + part[i].bytes;
    switch (pick(x, 6)) {
    case 0:
        return GUEST_ADDR + begin + pick(x, 64) - 32;
    case 1:
        return GUEST_ADDR + end + pick(x, 64) - 32;
    case 2:
        return pick(x, 2) ? test_random(&x->seed) : UINT64_MAX - pick(x, 64);
    default:
        return GUEST_ADDR + end - length + pick(x, 33) - 16;
    }
}

static uint32_t some_length(struct racer *x)
{
    static const uint32_t lengths[] = {0,   1,    16,    32,       48,         17,         16 * 1024,  16 * 65535,
                                       512, 4096, 65536, 1u << 21, 0x7fffffff, 0x80000000, 0xfffffff0, UINT32_MAX};
    return lengths[pick(x, sizeof lengths / sizeof lengths[0])];
}

/* Another value for a moment, and what was there again: all else is in order then, and so whatever looks at this
 * twice, or does not look at it, goes far. */
#define FLICKER(x, field, value)                                              \
    do {                                                                      \
        __typeof__(field) was_ = __atomic_load_n(&(field), __ATOMIC_RELAXED); \
        __typeof__(field) other_ = (__typeof__(field))(value);                \
        for (uint64_t n_ = 1 + pick(x, 200); n_ > 0; n_--) {                  \
            __atomic_store_n(&(field), other_, __ATOMIC_RELAXED);             \
            for (uint64_t k_ = pick(x, 2) ? 0 : pick(x, 50); k_ > 0; k_--)    \
                atomic_signal_fence(memory_order_seq_cst);                    \
            __atomic_store_n(&(field), was_, __ATOMIC_RELAXED);               \
            (x)->stores += 2;                                                 \
        }                                                                     \
    } while (0)

/* Of one request: its type, its sector, or its data. */
static void rewrite_request(struct racer *x, uint8_t *header, uint8_t *data)
{
    switch (pick(x, 3)) {
    case 0:
        FLICKER(x, *(uint32_t *)(void *)header, pick(x, 16));
        break;
    case 1:
        FLICKER(x, *(uint64_t *)(void *)(header + 8),
                pick(x, 4) ? pick(x, 2 * DISK_BYTES / 512) : test_random(&x->seed));
        break;
    default:
        __atomic_store_n((uint64_t *)(void *)(data + 8 * pick(x, 512)), pick(x, 0x7f), __ATOMIC_RELAXED);
    }
}

/* ---- the driver -------------------------------------------------------------- */

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

struct good_request {
    uint32_t type, bytes;
    uint64_t sector;
};

static struct good_request some_request(uint64_t *seed)
{
    static const uint32_t types[] = {VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_FLUSH};
    uint32_t type = types[test_random(seed) % 4], bytes = 512u * (1 + (uint32_t)(test_random(seed) % 8));
    return (struct good_request){.type = type,
                                 .bytes = type == VIRTIO_BLK_T_FLUSH ? 0 : bytes,
                                 .sector = test_random(seed) % (DISK_BYTES / 512 - 8)};
}

/* The engine with a good driver on its rings, and the thread that spoils what the driver has put there. */
struct contest {
    struct rig rig;
    struct racer racer;
    unsigned breaches;
};

/* Sets the rings up anew if one of them is broken: which of them it was may have been told while something else was
 * awaited. */
static void mend_rings(struct contest *c, void (*set_up_anew)(struct contest *c, unsigned ring))
{
    while (c->breaches != c->rig.seen[VS_EV_QUEUE_BROKEN]) {
        c->breaches = c->rig.seen[VS_EV_QUEUE_BROKEN];
        for (unsigned k = 0; k < RACED_LANES; k++)
            set_up_anew(c, k);
    }
}

/* The guest is attached. turn(): requests out to one ring, answers in. */
static void run_contest(struct contest *c, void (*turn)(struct contest *c, unsigned ring, uint64_t *seed),
                        void (*set_up_anew)(struct contest *c, unsigned ring))
{
    const char *wanted = getenv("VHOSTSYNC_TOCTOU_S");
    struct rig *r = &c->rig;
    uint64_t seed = 5, end;
    rig_mirror(r);
    c->racer.seed = 77;
    CHECK_EQUAL(pthread_create(&c->racer.thread, NULL, race, &c->racer), 0);
    end = now_ms() + 1000 * (wanted ? strtoull(wanted, NULL, 10) : 3);
    for (unsigned n = 0; now_ms() < end; n++) {
        turn(c, n % RACED_LANES, &seed);
        mend_rings(c, set_up_anew);
        if (n % 500 == 0)
            set_table(r); /* while requests of the former table are under way */
    }
    atomic_store(&c->racer.stop, true);
    pthread_join(c->racer.thread, NULL);
    for (unsigned i = 0; i < RACED_LANES; i++)
        set_up_anew(c, i);
    CHECK_EQUAL(rig_simple(r, VS_CMD_MIRROR_DRAIN, 0), 0);
    CHECK_EQUAL(r->state, VS_STEADY);
    CHECK(disks_equal(r->source, r->destination, CUT_NONE));
    check_secret(r);
    CHECK(r->seen[VS_EV_QUEUE_BROKEN] > 0);
}

static int toctou_main(void (*nothing_outside_is_touched_and_nothing_hangs)(void))
{
#if defined(__SANITIZE_THREAD__)
    (void)nothing_outside_is_touched_and_nothing_hangs;
    printf("1..0 # SKIP the races are the test\n");
    return 0;
#else
    test("nothing outside is touched and nothing hangs", nothing_outside_is_touched_and_nothing_hangs);
    return tests_end();
#endif
}

#endif
