/* SPDX-License-Identifier: Apache-2.0 */
#include "virtqueue.h"

#include "inflight_packed.h"
#include "packed_driver.h"

#define DATA (GUEST_ADDR + 0x80000)

enum { NEXT = VRING_DESC_F_NEXT, WRITE = VRING_DESC_F_WRITE, INDIRECT = VRING_DESC_F_INDIRECT };

struct world {
    struct guest guest;
    struct guest_memory memory;
    struct packed_driver ring;
    struct virtqueue vq;
};

static void on_gone(struct guest_memory *m, uint64_t token)
{
    (void)m, (void)token;
}

static struct world *begin_ring(unsigned num, bool event_idx, bool indirect, uint16_t at)
{
    struct world *w = calloc(1, sizeof *w);
    w->guest = guest_make(1 << 20);
    w->ring = packed_make(&w->guest, num, at);
    CHECK_EQUAL(guest_memory_init(&w->memory, on_gone), 0);
    struct vs_region r = guest_region(&w->guest, 0, w->guest.bytes);
    CHECK_EQUAL(guest_memory_set(&w->memory, &r, 1), 0);
    virtqueue_reset(&w->vq);
    CHECK_EQUAL(virtqueue_choose_layout(&w->vq, true), 0);
    w->vq.num = num;
    w->vq.desc_user = USER_ADDR + w->ring.desc_at;
    w->vq.avail_user = USER_ADDR + w->ring.driver_at;
    w->vq.used_user = USER_ADDR + w->ring.device_at;
    w->vq.indirect = indirect;
    w->vq.event_idx = event_idx;
    CHECK(virtqueue_map(&w->vq, w->memory.current));
    CHECK_EQUAL(virtqueue_start(&w->vq, at | (uint32_t)at << 16), 0);
    return w;
}

static void end(struct world *w)
{
    virtqueue_reset(&w->vq);
    guest_memory_free(&w->memory);
    guest_end(&w->guest);
    free(w);
}

static void put(struct world *w, unsigned count, unsigned id)
{
    struct vring_packed_desc d[VS_MAX_QUEUE_SIZE];
    for (unsigned i = 0; i < count; i++)
        d[i] = (struct vring_packed_desc){.addr = DATA + i, .len = i + 1, .flags = i + 1 == count ? WRITE : 0};
    packed_put(&w->ring, d, count, id);
}

static void take(struct world *w, unsigned expected)
{
    uint16_t chain;
    CHECK_EQUAL(virtqueue_peek(&w->vq, &chain), 1);
    CHECK_EQUAL(chain, expected);
    virtqueue_take(&w->vq, chain);
}

static int peek(struct world *w)
{
    uint16_t chain;
    return virtqueue_peek(&w->vq, &chain);
}

static void reaps(struct world *w, unsigned expected, uint32_t bytes)
{
    unsigned id;
    uint32_t written;
    CHECK(packed_reap(&w->ring, &id, &written));
    CHECK_EQUAL(id, expected);
    CHECK_EQUAL(written, bytes);
}

/* ---- places ---------------------------------------------------------------- */

static bool maps(struct world *w, uint64_t desc, uint64_t driver, uint64_t device)
{
    w->vq.desc_user = USER_ADDR + desc;
    w->vq.avail_user = USER_ADDR + driver;
    w->vq.used_user = USER_ADDR + device;
    return virtqueue_map(&w->vq, w->memory.current);
}

static void places(void)
{
    struct world *w = begin_ring(100, true, true, WRAP); /* no power of two */
    uint64_t top = w->guest.bytes;
    CHECK(maps(w, 0, 4096, 8192));
    CHECK(!maps(w, 8, 4096, 8192));      /* alignment: 2.8.10.1 */
    CHECK(virtqueue_answerable(&w->vq)); /* where it was */
    CHECK(!maps(w, 0, 4098, 8192));
    CHECK(!maps(w, 0, 4096, 8194));
    CHECK(maps(w, top - 1600, top - 4, top - 4));
    CHECK(!maps(w, top - 1584, 4096, 8192));
    CHECK(!maps(w, 0, top, 8192));
    CHECK(!maps(w, 0, 4096, top));
    CHECK(!maps(w, UINT64_MAX - USER_ADDR - 15, 4096, 8192));
    virtqueue_unmap(&w->vq);
    CHECK(!virtqueue_answerable(&w->vq));
    CHECK(!virtqueue_has_more(&w->vq));
    w->vq.num = 0;
    CHECK(!maps(w, 0, 4096, 8192));
    end(w);
}

static void bases(void)
{
    struct world *w = begin_ring(6, false, false, WRAP | 5);
    CHECK_EQUAL(virtqueue_base(&w->vq), 0x80058005u);
    CHECK_EQUAL(virtqueue_start(&w->vq, 0x8003), 0); /* 16 bits are told by some */
    CHECK_EQUAL(virtqueue_base(&w->vq), 0x80038003u);
    CHECK_EQUAL(virtqueue_start(&w->vq, 0x00030003), 0);
    CHECK_EQUAL(virtqueue_base(&w->vq), 0x00030003u);
    CHECK_EQUAL(virtqueue_start(&w->vq, 0x8006), -VS_BREACH_AVAILABLE_INDEX);
    CHECK_EQUAL(virtqueue_start(&w->vq, 0x80008003u), 0); /* nothing is in flight, so this cannot be */
    CHECK_EQUAL(virtqueue_base(&w->vq), 0x80038003u);
    CHECK_EQUAL(virtqueue_start(&w->vq, 0xffff), -VS_BREACH_AVAILABLE_INDEX);
    end(w);
}

/* ---- around the ring --------------------------------------------------------- */

static void heads(void)
{
    struct world *w = begin_ring(4, false, false, WRAP);
    CHECK_EQUAL(peek(w), 0);
    put(w, 2, 3);
    CHECK_EQUAL(peek(w), 0); /* the head's flags are the last that the guest writes */
    put(w, 1, 1);
    CHECK(!virtqueue_has_more(&w->vq));
    packed_publish(&w->ring);
    CHECK(virtqueue_has_more(&w->vq));
    CHECK_EQUAL(peek(w), 1); /* takes nothing */
    take(w, 3);
    take(w, 1);
    CHECK_EQUAL(peek(w), 0);
    CHECK(!virtqueue_has_more(&w->vq));
    end(w);
}

/* Chains of all lengths, answered in another order, again and again: both sides skip as far as the chain is long. */
static void rounds(void)
{
    for (unsigned num = 1; num <= 1024; num = num * 3 + 1) {
        struct world *w = begin_ring(num, true, false, WRAP);
        unsigned length[3] = {1 + num / 3, num / 2, num / 5};
        for (unsigned round = 0; round < 60; round++) {
            unsigned count = 0, used = 0, order;
            for (; count < 3 && length[count] && used + length[count] <= num; used += length[count++])
                put(w, length[count], (round + count) % num);
            packed_publish(&w->ring);
            for (unsigned i = 0; i < count; i++)
                take(w, (round + i) % num);
            CHECK_EQUAL(peek(w), 0);
            for (unsigned i = 0; i < count; i++) {
                order = (round + (i + round) % count) % num;
                virtqueue_push(&w->vq, (uint16_t)order, round + i);
            }
            unsigned id;
            uint32_t written;
            CHECK(!packed_reap(&w->ring, &id, &written)); /* not shown yet */
            virtqueue_show_used(&w->vq);
            for (unsigned i = 0; i < count; i++)
                reaps(w, (round + (i + round) % count) % num, round + i);
            CHECK(!packed_reap(&w->ring, &id, &written));
            CHECK_EQUAL(virtqueue_base(&w->vq), w->ring.used | (uint32_t)w->ring.avail << 16);
        }
        end(w);
    }
}

/* A chain at work outlives its descriptors: the used element of another one lies over them. */
static void answered_over_one_at_work(void)
{
    struct world *w = begin_ring(4, false, false, WRAP);
    put(w, 2, 0);
    put(w, 2, 1);
    packed_publish(&w->ring);
    take(w, 0);
    take(w, 1);
    virtqueue_push(&w->vq, 1, 7);
    virtqueue_show_used(&w->vq);
    reaps(w, 1, 7);
    put(w, 2, 1);
    packed_publish(&w->ring);
    take(w, 1);
    CHECK_EQUAL(peek(w), 0);
    virtqueue_push(&w->vq, 0, 8);
    virtqueue_push(&w->vq, 1, 9);
    virtqueue_show_used(&w->vq);
    reaps(w, 0, 8);
    reaps(w, 1, 9);
    end(w);
}

/* ---- chains ------------------------------------------------------------------ */

/* Minus a breach of peek or of the walk, or how many segments. */
static int walk(struct world *w, struct chain_segment *out, int max)
{
    struct chain c;
    uint16_t id;
    int count = 0, rc = virtqueue_peek(&w->vq, &id);
    if (rc <= 0)
        return rc;
    chain_begin(&c, &w->vq, w->memory.current, id);
    while ((rc = chain_next(&c, &out[count])) > 0)
        CHECK(++count < max);
    if (rc == 0)
        CHECK_EQUAL(chain_next(&c, &out[count]), 0); /* stays at its end */
    return rc < 0 ? rc : count;
}

static void direct_chains(void)
{
    struct world *w = begin_ring(8, false, true, WRAP | 6); /* over the end of the ring */
    struct chain_segment s[2000];
    const struct vring_packed_desc chain[3] = {{.addr = DATA, .len = 16},
                                               {.addr = DATA + 4096, .len = 512, .flags = WRITE},
                                               {.addr = DATA + 16, .len = 1, .flags = WRITE}};
    packed_put(&w->ring, chain, 3, 5);
    packed_publish(&w->ring);
    CHECK_EQUAL(walk(w, s, 2000), 3);
    CHECK(s[0].addr == DATA && s[0].len == 16 && !s[0].device_writes);
    CHECK(s[1].addr == DATA + 4096 && s[1].len == 512 && s[1].device_writes);
    CHECK(s[2].addr == DATA + 16 && s[2].len == 1 && s[2].device_writes);
    w->ring.desc[0].addr = 0; /* what comes after the look at it is not seen */
    struct chain c;
    chain_begin(&c, &w->vq, w->memory.current, 5);
    for (int i = 0; i < 3; i++)
        CHECK(chain_next(&c, &s[i]) == 1);
    CHECK(s[2].addr == DATA + 16);
    end(w);
}

static void bad_chains(void)
{
    struct world *w = begin_ring(8, false, true, WRAP);
    struct chain_segment s[2000];
    put(w, 8, 5);
    packed_publish(&w->ring);
    CHECK_EQUAL(walk(w, s, 2000), 8); /* the whole ring */
    w->ring.desc[7].flags |= NEXT;    /* around, and around */
    CHECK_EQUAL(walk(w, s, 2000), -VS_BREACH_CHAIN);
    w->ring.desc[7].flags &= (uint16_t)~NEXT;
    w->ring.desc[7].id = 8;
    CHECK_EQUAL(walk(w, s, 2000), -VS_BREACH_HEAD);
    w->ring.desc[7].id = 0xffff;
    CHECK_EQUAL(walk(w, s, 2000), -VS_BREACH_HEAD);
    w->ring.desc[7].id = 7;
    CHECK_EQUAL(walk(w, s, 2000), 8);
    end(w);

    w = begin_ring(8, false, true, WRAP);
    put(w, 3, 5);
    put(w, 2, 5); /* an ID that is at work */
    packed_publish(&w->ring);
    take(w, 5);
    CHECK_EQUAL(peek(w), -VS_BREACH_HEAD);
    w->ring.desc[4].id = 4;
    CHECK_EQUAL(walk(w, s, 2000), 2);
    w->ring.desc[4].flags |= NEXT; /* into what is not used yet: 3 + 6 of 8 */
    for (unsigned i = 5; i < 8; i++)
        w->ring.desc[i].flags = NEXT;
    CHECK_EQUAL(walk(w, s, 2000), -VS_BREACH_CHAIN);
    end(w);

    w = begin_ring(2, false, true, WRAP); /* all is at work, and more is available */
    put(w, 2, 0);
    packed_publish(&w->ring);
    take(w, 0);
    w->ring.desc[0].flags = PACKED_USED;
    CHECK_EQUAL(peek(w), -VS_BREACH_AVAILABLE_INDEX);
    virtqueue_push(&w->vq, 0, 1); /* written, and not shown: the guest cannot know */
    w->ring.desc[0].flags = PACKED_USED;
    CHECK_EQUAL(peek(w), -VS_BREACH_AVAILABLE_INDEX);
    end(w);
}

static void indirect_chains(void)
{
    struct world *w = begin_ring(8, false, true, WRAP);
    struct chain_segment s[2000];
    struct vring_packed_desc *table = (struct vring_packed_desc *)(void *)(w->guest.base + 0x40000);
    const struct vring_packed_desc head = {.addr = GUEST_ADDR + 0x40000,
                                           .len = 16 * VS_MAX_QUEUE_SIZE,
                                           .flags = INDIRECT | WRITE}; /* the write flag is ignored there */
    /* So are all flags but that in the table. */
    for (unsigned i = 0; i < VS_MAX_QUEUE_SIZE; i++)
        table[i] = (struct vring_packed_desc){.addr = DATA + i,
                                              .len = i + 1,
                                              .id = 0xffff,
                                              .flags = i == VS_MAX_QUEUE_SIZE - 1 ? WRITE | NEXT : INDIRECT};
    packed_put(&w->ring, &head, 1, 3);
    packed_publish(&w->ring);
    CHECK_EQUAL(walk(w, s, 2000), VS_MAX_QUEUE_SIZE); /* longer than the queue */
    CHECK(!s[0].device_writes && s[VS_MAX_QUEUE_SIZE - 1].device_writes);
    CHECK_EQUAL(s[VS_MAX_QUEUE_SIZE - 1].len, VS_MAX_QUEUE_SIZE);
    struct vring_packed_desc *d = &w->ring.desc[0];
    static const uint32_t bad_length[] = {0, 1, 15, 17, 16 * VS_MAX_QUEUE_SIZE + 16, UINT32_MAX, UINT32_MAX - 15};
    for (size_t i = 0; i < sizeof bad_length / sizeof bad_length[0]; i++) {
        d->len = bad_length[i];
        CHECK_EQUAL(walk(w, s, 2000), -VS_BREACH_INDIRECT);
    }
    d->len = 64;
    static const uint64_t bad_address[] = {0, GUEST_ADDR - 16, UINT64_MAX - 15, UINT64_MAX};
    for (size_t i = 0; i < sizeof bad_address / sizeof bad_address[0]; i++) {
        d->addr = bad_address[i];
        CHECK_EQUAL(walk(w, s, 2000), -VS_BREACH_INDIRECT);
    }
    d->addr = GUEST_ADDR + w->guest.bytes - 48;
    CHECK_EQUAL(walk(w, s, 2000), -VS_BREACH_INDIRECT);
    memmove(w->guest.base + 0x40003, table, 64); /* any alignment */
    d->addr = GUEST_ADDR + 0x40003;
    CHECK_EQUAL(walk(w, s, 2000), 4);
    w->vq.indirect = false; /* not negotiated */
    CHECK_EQUAL(walk(w, s, 2000), -VS_BREACH_CHAIN);
    w->vq.indirect = true;
    d->flags |= NEXT; /* a list is of one kind, and an indirect descriptor is a list of its own */
    w->ring.desc[1].id = 3;
    CHECK_EQUAL(walk(w, s, 2000), -VS_BREACH_CHAIN);
    end(w);
}

/* ---- notifications ------------------------------------------------------------ */

static bool answer(struct world *w, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        put(w, 1, i);
    packed_publish(&w->ring);
    for (unsigned i = 0; i < count; i++) {
        take(w, i);
        virtqueue_push(&w->vq, (uint16_t)i, 0);
    }
    return virtqueue_show_used(&w->vq);
}

static void reap_all(struct world *w)
{
    unsigned id;
    uint32_t written;
    while (packed_reap(&w->ring, &id, &written))
        ;
}

static void notify_without_event_idx(void)
{
    struct world *w = begin_ring(16, false, false, WRAP);
    CHECK(!virtqueue_show_used(&w->vq)); /* nothing to show */
    CHECK(answer(w, 1));
    w->ring.driver->flags = VRING_PACKED_EVENT_FLAG_DISABLE;
    CHECK(!answer(w, 2));
    reap_all(w);
    w->ring.driver->flags = VRING_PACKED_EVENT_FLAG_DESC; /* was not negotiated */
    CHECK(answer(w, 1));
    w->ring.driver->flags = VRING_PACKED_EVENT_FLAG_ENABLE;
    CHECK(answer(w, 1));
    virtqueue_no_kicks(&w->vq);
    CHECK_EQUAL(w->ring.device->flags, VRING_PACKED_EVENT_FLAG_DISABLE);
    CHECK(!virtqueue_ask_for_kick(&w->vq));
    CHECK_EQUAL(w->ring.device->flags, VRING_PACKED_EVENT_FLAG_ENABLE);
    put(w, 1, 0);
    packed_publish(&w->ring);
    CHECK(virtqueue_ask_for_kick(&w->vq)); /* one is there already */
    end(w);
}

/* Against the definition: the guest is told when the descriptor that it names is among those that were used, wherever
 * the ring ends. */
static void notify_with_event_idx(void)
{
    const unsigned num = 12;
    for (unsigned at = 0; at < num; at++) {
        struct world *w = begin_ring(num, true, false, (uint16_t)at);
        w->ring.driver->flags = VRING_PACKED_EVENT_FLAG_DESC;
        CHECK(answer(w, 1)); /* the first is always announced: nobody knows what went before */
        reap_all(w);
        for (unsigned step = 1; step <= num; step++) {
            for (unsigned distance = 0; distance < num; distance++) {
                uint16_t event = packed_step(num, w->ring.used, distance);
                w->ring.driver->off_wrap = event;
                CHECK_EQUAL(answer(w, step), distance < step);
                reap_all(w);
            }
            for (unsigned behind = 1; behind <= num; behind++) { /* what was passed before */
                uint16_t event = packed_step(num, w->ring.used ^ WRAP, num - behind);
                w->ring.driver->off_wrap = event;
                CHECK_EQUAL(answer(w, step), false);
                reap_all(w);
            }
        }
        w->ring.driver->flags = VRING_PACKED_EVENT_FLAG_ENABLE;
        CHECK(answer(w, 1));
        w->ring.driver->flags = VRING_PACKED_EVENT_FLAG_DISABLE;
        CHECK(!answer(w, 1));
        reap_all(w);
        CHECK(!virtqueue_ask_for_kick(&w->vq));
        CHECK_EQUAL(w->ring.device->flags, VRING_PACKED_EVENT_FLAG_DESC);
        CHECK_EQUAL(w->ring.device->off_wrap, w->ring.avail);
        put(w, 1, 0);
        packed_publish(&w->ring);
        CHECK(virtqueue_ask_for_kick(&w->vq));
        end(w);
    }
}

/* ---- the memory's end, and its log ---------------------------------------------- */

static void ring_taken_away(void)
{
    struct world *w = begin_ring(16, true, false, WRAP);
    put(w, 1, 1);
    put(w, 1, 2);
    packed_publish(&w->ring);
    take(w, 1);
    take(w, 2);
    virtqueue_push(&w->vq, 1, 1);
    virtqueue_unmap(&w->vq);
    virtqueue_push(&w->vq, 2, 1);
    CHECK(!virtqueue_show_used(&w->vq));
    end(w);
}

static bool logged(const uint8_t *bits, uint64_t page)
{
    return bits[page / 8] & (1u << page % 8);
}

static void begin_log(struct dirty_log *log, uint64_t bytes)
{
    int fd = memfd_create("log", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
    CHECK_EQUAL(dirty_log_map(log, fd, bytes, 0), 0);
}

/* Used elements lie among the descriptors, whose guest address no message tells; the device's wishes where it does. */
static void used_elements_are_logged(void)
{
    struct world *w = begin_ring(512, false, false, WRAP | 200); /* two pages of descriptors */
    uint64_t bytes = (GUEST_ADDR + w->guest.bytes) / DIRTY_LOG_PAGE_BYTES / 8, desc_page, wish = GUEST_ADDR + 0x77000;
    struct dirty_log log = {.map = NULL};
    begin_log(&log, bytes);
    w->vq.log = &log;
    w->vq.used_log_addr = wish;
    desc_page = (GUEST_ADDR + w->ring.desc_at) / DIRTY_LOG_PAGE_BYTES;
    answer(w, 1);
    CHECK(logged(log.bits, desc_page) && !logged(log.bits, desc_page + 1));
    CHECK(!logged(log.bits, wish / DIRTY_LOG_PAGE_BYTES));
    log.bits[desc_page / 8] = 0;
    reap_all(w);
    answer(w, 100); /* written while the page was taken from the log, shown later */
    CHECK(logged(log.bits, desc_page) && logged(log.bits, desc_page + 1));
    virtqueue_ask_for_kick(&w->vq);
    CHECK(logged(log.bits, wish / DIRTY_LOG_PAGE_BYTES));
    reap_all(w);
    put(w, 1, 0);
    packed_publish(&w->ring);
    take(w, 0);
    virtqueue_push(&w->vq, 0, 0);
    memset(log.bits, 0, bytes); /* the frontend reads the page now */
    virtqueue_show_used(&w->vq);
    CHECK(logged(log.bits, desc_page + 1)); /* and again, for the flags */
    dirty_log_unmap(&log);
    end(w);
}

/* A process that was killed has written elements that it did not come to log; which, nobody knows. */
static void former_elements_are_logged(void)
{
    static struct inflight_packed record;
    struct world *w = begin_ring(512, false, false, WRAP | 200);
    uint64_t bytes = (GUEST_ADDR + w->guest.bytes) / DIRTY_LOG_PAGE_BYTES / 8, desc_page;
    struct dirty_log log = {.map = NULL};
    begin_log(&log, bytes);
    w->vq.log = &log;
    w->vq.used_log_addr = GUEST_ADDR;
    desc_page = (GUEST_ADDR + w->ring.desc_at) / DIRTY_LOG_PAGE_BYTES;
    CHECK_EQUAL(virtqueue_start(&w->vq, WRAP | 200), 0);
    CHECK(!logged(log.bits, desc_page) && !logged(log.bits, desc_page + 1)); /* there was no other */
    w->vq.record = &record;
    CHECK_EQUAL(virtqueue_start(&w->vq, WRAP | 200), 0);
    CHECK(logged(log.bits, desc_page) && logged(log.bits, desc_page + 1) && !logged(log.bits, desc_page + 2));
    w->vq.record = NULL;
    dirty_log_unmap(&log);
    end(w);
}

int main(void)
{
    test("places of the parts", places);
    test("bases", bases);
    test("heads", heads);
    test("around the ring", rounds);
    test("answered over one at work", answered_over_one_at_work);
    test("direct chains", direct_chains);
    test("bad chains and IDs", bad_chains);
    test("indirect chains", indirect_chains);
    test("notifications without EVENT_IDX", notify_without_event_idx);
    test("notifications with EVENT_IDX", notify_with_event_idx);
    test("a ring taken away", ring_taken_away);
    test("used elements are logged", used_elements_are_logged);
    test("a former process's elements are logged", former_elements_are_logged);
    return tests_end();
}
