/* SPDX-License-Identifier: Apache-2.0 */
#include "virtqueue.h"

#include "inflight.h"
#include "ring.h"

#define DATA (GUEST_ADDR + 0x80000)

struct world {
    struct guest guest;
    struct guest_memory memory;
    struct ring ring;
    struct virtqueue vq;
};

static void on_gone(struct guest_memory *m, uint64_t token)
{
    (void)m, (void)token;
}

static struct world begin_ring(unsigned num, bool event_idx, bool indirect, uint16_t base)
{
    struct world w = {.guest = guest_make(1 << 20)};
    w.ring = ring_make(&w.guest, num);
    CHECK_EQUAL(guest_memory_init(&w.memory, on_gone), 0);
    struct vs_region r = guest_region(&w.guest, 0, w.guest.bytes);
    CHECK_EQUAL(guest_memory_set(&w.memory, &r, 1), 0);
    w.vq = (struct virtqueue){.layout = &ring_split,
                              .num = num,
                              .desc_user = USER_ADDR + w.ring.desc_at,
                              .avail_user = USER_ADDR + w.ring.avail_at,
                              .used_user = USER_ADDR + w.ring.used_at,
                              .indirect = indirect,
                              .event_idx = event_idx};
    CHECK(virtqueue_map(&w.vq, w.memory.current));
    w.ring.published = w.ring.reaped = base;
    w.ring.avail->idx = w.ring.used->idx = base;
    CHECK_EQUAL(virtqueue_start(&w.vq, base), 0);
    return w;
}

static void end(struct world *w)
{
    guest_memory_free(&w->memory);
    guest_end(&w->guest);
}

/* ---- places ---------------------------------------------------------------- */

static bool maps(struct world *w, uint64_t desc, uint64_t avail, uint64_t used)
{
    w->vq.desc_user = USER_ADDR + desc;
    w->vq.avail_user = USER_ADDR + avail;
    w->vq.used_user = USER_ADDR + used;
    bool mapped = virtqueue_map(&w->vq, w->memory.current);
    CHECK_EQUAL(mapped, w->vq.mapped);
    return mapped;
}

static void places(void)
{
    struct world w = begin_ring(256, true, true, 0);
    uint64_t top = w.guest.bytes;
    CHECK(maps(&w, 0, 4096, 8192));
    CHECK(!maps(&w, 8, 4096, 8192)); /* alignment: 2.7, table of requirements */
    CHECK(!maps(&w, 0, 4097, 8192));
    CHECK(!maps(&w, 0, 4096, 8194));
    CHECK(maps(&w, top - 4096, 4098, 8196));
    CHECK(!maps(&w, top - 4096 + 16, 4096, 8192));
    CHECK(maps(&w, 0, top - 518, 8192));
    CHECK(!maps(&w, 0, top - 516, 8192));
    CHECK(maps(&w, 0, 4096, top - 2056));
    CHECK(!maps(&w, 0, 4096, top - 2052));
    CHECK(!maps(&w, (uint64_t)0 - 4096, 4096, 8192));
    CHECK(!maps(&w, UINT64_MAX - USER_ADDR - 15, 4096, 8192));
    w.vq.event_idx = false; /* then the event fields need not be there */
    CHECK(maps(&w, 0, top - 516, top - 2052));
    CHECK(!maps(&w, 0, top - 514, 8192));
    w.vq.num = 0;
    CHECK(!maps(&w, 0, 4096, 8192));
    end(&w);
}

/* ---- the available ring ---------------------------------------------------- */

static void heads(void)
{
    struct world w = begin_ring(4, false, false, 0);
    uint16_t head;
    CHECK_EQUAL(virtqueue_peek(&w.vq, &head), 0);
    ring_put(&w.ring, 3);
    CHECK_EQUAL(virtqueue_peek(&w.vq, &head), 0); /* not yet published */
    ring_put(&w.ring, 1);
    ring_publish(&w.ring);
    CHECK_EQUAL(virtqueue_peek(&w.vq, &head), 1);
    CHECK_EQUAL(head, 3);
    CHECK_EQUAL(virtqueue_peek(&w.vq, &head), 1); /* takes nothing */
    CHECK_EQUAL(head, 3);
    virtqueue_take(&w.vq, head);
    CHECK_EQUAL(virtqueue_peek(&w.vq, &head), 1);
    CHECK_EQUAL(head, 1);
    virtqueue_take(&w.vq, head);
    CHECK_EQUAL(virtqueue_peek(&w.vq, &head), 0);
    end(&w);
}

/* The free-running indices pass 65535; a full ring is legal. */
static void indices_wrap(void)
{
    for (unsigned num = 1; num <= 1024; num *= 2) {
        struct world w = begin_ring(num, true, false, 65530);
        uint16_t head;
        struct vring_used_elem e;
        for (unsigned round = 0; round < 40; round++) {
            for (unsigned i = 0; i < num; i++)
                ring_put(&w.ring, i);
            ring_publish(&w.ring);
            for (unsigned i = 0; i < num; i++) {
                CHECK_EQUAL(virtqueue_peek(&w.vq, &head), 1);
                CHECK_EQUAL(head, i);
                virtqueue_take(&w.vq, head);
                virtqueue_push(&w.vq, head, i + 1);
            }
            CHECK_EQUAL(virtqueue_peek(&w.vq, &head), 0);
            CHECK(!ring_reap(&w.ring, &e)); /* not shown yet */
            virtqueue_show_used(&w.vq);
            for (unsigned i = 0; i < num; i++) {
                CHECK(ring_reap(&w.ring, &e));
                CHECK_EQUAL(e.id, i);
                CHECK_EQUAL(e.len, i + 1);
            }
            CHECK(!ring_reap(&w.ring, &e));
        }
        end(&w);
    }
}

static void bad_indices(void)
{
    uint16_t head;
    for (unsigned num = 1; num <= 1024; num *= 4) {
        for (unsigned base = 0; base < 65536; base += 16381) {
            struct world w = begin_ring(num, false, false, (uint16_t)base);
            w.ring.avail->idx = (uint16_t)(base + num + 1);
            CHECK_EQUAL(virtqueue_peek(&w.vq, &head), -VS_BREACH_AVAILABLE_INDEX);
            w.ring.avail->idx = (uint16_t)(base - 1); /* backwards */
            CHECK_EQUAL(virtqueue_peek(&w.vq, &head), -VS_BREACH_AVAILABLE_INDEX);
            w.ring.avail->idx = (uint16_t)(base + num);
            w.ring.avail->ring[base % num] = (uint16_t)num;
            CHECK_EQUAL(virtqueue_peek(&w.vq, &head), -VS_BREACH_HEAD);
            w.ring.avail->ring[base % num] = (uint16_t)(num - 1);
            CHECK_EQUAL(virtqueue_peek(&w.vq, &head), 1);
            end(&w);
        }
    }
}

/* ---- chains ----------------------------------------------------------------- */

static int walk(struct world *w, uint16_t head, struct chain_segment *out, int max)
{
    struct chain c;
    int count = 0, rc;
    chain_begin(&c, &w->vq, w->memory.current, head);
    while ((rc = chain_next(&c, &out[count])) > 0)
        CHECK(++count < max);
    if (rc == 0)
        CHECK_EQUAL(chain_next(&c, &out[count]), 0); /* stays at its end */
    return rc < 0 ? rc : count;
}

enum { NEXT = VRING_DESC_F_NEXT, WRITE = VRING_DESC_F_WRITE, INDIRECT = VRING_DESC_F_INDIRECT };

static void direct_chains(void)
{
    struct world w = begin_ring(8, false, true, 0);
    struct chain_segment s[2000];
    ring_desc(&w.ring.desc[5], DATA, 16, NEXT, 2);
    ring_desc(&w.ring.desc[2], DATA + 4096, 512, NEXT | WRITE, 7);
    ring_desc(&w.ring.desc[7], DATA + 16, 1, WRITE, 99); /* next counts only with its flag */
    CHECK_EQUAL(walk(&w, 5, s, 2000), 3);
    CHECK(s[0].addr == DATA && s[0].len == 16 && !s[0].device_writes);
    CHECK(s[1].addr == DATA + 4096 && s[1].len == 512 && s[1].device_writes);
    CHECK(s[2].addr == DATA + 16 && s[2].len == 1 && s[2].device_writes);
    w.ring.desc[7].flags = NEXT | WRITE; /* leaves the table */
    CHECK_EQUAL(walk(&w, 5, s, 2000), -VS_BREACH_CHAIN);
    w.ring.desc[7].next = 8;
    CHECK_EQUAL(walk(&w, 5, s, 2000), -VS_BREACH_CHAIN);
    w.ring.desc[7].next = 5; /* a loop */
    CHECK_EQUAL(walk(&w, 5, s, 2000), -VS_BREACH_CHAIN);
    w.ring.desc[7].next = 7;
    CHECK_EQUAL(walk(&w, 7, s, 2000), -VS_BREACH_CHAIN);
    for (unsigned i = 0; i < 8; i++) /* the whole table is a chain */
        ring_desc(&w.ring.desc[i], DATA, 1, i < 7 ? NEXT : 0, i + 1);
    CHECK_EQUAL(walk(&w, 0, s, 2000), 8);
    end(&w);
}

static void indirect_chains(void)
{
    struct world w = begin_ring(8, false, true, 0);
    struct chain_segment s[2000];
    struct vring_desc *table = (struct vring_desc *)(void *)(w.guest.base + 0x40000);
    uint64_t at = GUEST_ADDR + 0x40000;
    for (unsigned i = 0; i < VS_MAX_QUEUE_SIZE; i++)
        ring_desc(&table[i], DATA + i, i + 1, i < VS_MAX_QUEUE_SIZE - 1 ? NEXT : WRITE, i + 1);
    ring_desc(&w.ring.desc[1], at, 16 * VS_MAX_QUEUE_SIZE, INDIRECT, 0);
    CHECK_EQUAL(walk(&w, 1, s, 2000), VS_MAX_QUEUE_SIZE); /* longer than the queue: 2.7.5.3.1 */
    CHECK(s[VS_MAX_QUEUE_SIZE - 1].len == VS_MAX_QUEUE_SIZE && s[VS_MAX_QUEUE_SIZE - 1].device_writes);
    ring_desc(&w.ring.desc[0], DATA, 16, NEXT, 1); /* after direct ones */
    CHECK_EQUAL(walk(&w, 0, s, 2000), VS_MAX_QUEUE_SIZE + 1);
    w.ring.desc[1].flags = INDIRECT | WRITE; /* the write flag is ignored there */
    CHECK_EQUAL(walk(&w, 1, s, 2000), VS_MAX_QUEUE_SIZE);
    w.ring.desc[1].flags = INDIRECT | NEXT;
    CHECK_EQUAL(walk(&w, 1, s, 2000), -VS_BREACH_CHAIN);
    w.ring.desc[1].flags = INDIRECT;
    table[3].flags = INDIRECT; /* nested */
    table[3].len = 16;
    CHECK_EQUAL(walk(&w, 1, s, 2000), -VS_BREACH_CHAIN);
    ring_desc(&table[3], DATA, 1, NEXT, 1); /* a loop */
    CHECK_EQUAL(walk(&w, 1, s, 2000), -VS_BREACH_CHAIN);
    table[3].next = VS_MAX_QUEUE_SIZE; /* out of the table */
    CHECK_EQUAL(walk(&w, 1, s, 2000), -VS_BREACH_CHAIN);
    ring_desc(&table[3], DATA, 1, 0, 0);
    CHECK_EQUAL(walk(&w, 1, s, 2000), 4);
    static const uint32_t bad_length[] = {0, 1, 15, 17, 16 * VS_MAX_QUEUE_SIZE + 16, UINT32_MAX, UINT32_MAX - 15};
    for (size_t i = 0; i < sizeof bad_length / sizeof bad_length[0]; i++) {
        w.ring.desc[1].len = bad_length[i];
        CHECK_EQUAL(walk(&w, 1, s, 2000), -VS_BREACH_INDIRECT);
    }
    w.ring.desc[1].len = 64;
    static const uint64_t bad_address[] = {0, GUEST_ADDR - 16, UINT64_MAX - 15, UINT64_MAX};
    for (size_t i = 0; i < sizeof bad_address / sizeof bad_address[0]; i++) {
        w.ring.desc[1].addr = bad_address[i];
        CHECK_EQUAL(walk(&w, 1, s, 2000), -VS_BREACH_INDIRECT);
    }
    w.ring.desc[1].addr = GUEST_ADDR + w.guest.bytes - 48;
    CHECK_EQUAL(walk(&w, 1, s, 2000), -VS_BREACH_INDIRECT);
    memmove(w.guest.base + 0x40003, table, 64); /* any alignment */
    w.ring.desc[1].addr = at + 3;
    CHECK_EQUAL(walk(&w, 1, s, 2000), 4);
    w.vq.indirect = false; /* not negotiated */
    CHECK_EQUAL(walk(&w, 1, s, 2000), -VS_BREACH_CHAIN);
    end(&w);
}

/* ---- notifications ---------------------------------------------------------- */

static bool push_and_show(struct world *w, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        virtqueue_push(&w->vq, 0, 0);
    return virtqueue_show_used(&w->vq);
}

static void notify_without_event_idx(void)
{
    struct world w = begin_ring(16, false, false, 0);
    CHECK(!virtqueue_show_used(&w.vq)); /* nothing to show */
    CHECK(push_and_show(&w, 1));
    w.ring.avail->flags = VRING_AVAIL_F_NO_INTERRUPT;
    CHECK(!push_and_show(&w, 2));
    CHECK_EQUAL(w.ring.used->idx, 3);
    w.ring.avail->flags = 0;
    CHECK(push_and_show(&w, 1));
    virtqueue_no_kicks(&w.vq);
    CHECK_EQUAL(w.ring.used->flags, VRING_USED_F_NO_NOTIFY);
    CHECK(!virtqueue_ask_for_kick(&w.vq));
    CHECK_EQUAL(w.ring.used->flags, 0);
    ring_put(&w.ring, 0);
    ring_publish(&w.ring);
    CHECK(virtqueue_ask_for_kick(&w.vq)); /* one is there already */
    end(&w);
}

/* Against the definition: the guest is told when the index passes its event, for every distance, also at the wrap. */
static void notify_with_event_idx(void)
{
    static const uint16_t bases[] = {0, 100, 65520, 65535};
    for (size_t b = 0; b < sizeof bases / sizeof bases[0]; b++) {
        struct world w = begin_ring(32, true, false, bases[b]);
        CHECK(push_and_show(&w, 1)); /* the first is always announced: nobody knows what went before */
        for (unsigned step = 1; step <= 32; step++) {
            for (int distance = -40; distance <= 40; distance++) {
                uint16_t old = w.ring.used->idx;
                *ring_used_event(&w.ring) = (uint16_t)(old + distance);
                bool wanted = distance >= 0 && distance < (int)step;
                CHECK_EQUAL(push_and_show(&w, step), wanted);
                CHECK_EQUAL((uint16_t)(w.ring.used->idx - old), step);
            }
        }
        uint16_t taken = w.ring.published;
        CHECK(!virtqueue_ask_for_kick(&w.vq));
        CHECK_EQUAL(*ring_avail_event(&w.ring), taken);
        ring_put(&w.ring, 0);
        ring_publish(&w.ring);
        CHECK(virtqueue_ask_for_kick(&w.vq));
        end(&w);
    }
}

/* The memory goes while requests are in flight. */
static void ring_taken_away(void)
{
    struct world w = begin_ring(16, true, false, 0);
    virtqueue_push(&w.vq, 1, 1);
    virtqueue_unmap(&w.vq);
    virtqueue_push(&w.vq, 2, 1);
    CHECK(!virtqueue_show_used(&w.vq));
    end(&w);
}

/* A process that was killed has written to it what it did not come to log. */
static void a_former_process_s_ring_is_logged(void)
{
    static struct inflight_ring record;
    struct world w = begin_ring(1024, false, false, 7); /* three pages of used elements */
    uint64_t used = GUEST_ADDR + w.ring.used_at, first = used / DIRTY_LOG_PAGE_BYTES,
             last = (used + 4 + 8 * 1024 - 1) / DIRTY_LOG_PAGE_BYTES,
             bytes = (GUEST_ADDR + w.guest.bytes) / DIRTY_LOG_PAGE_BYTES / 8;
    struct dirty_log log = {.map = NULL};
    int fd = memfd_create("log", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
    CHECK_EQUAL(dirty_log_map(&log, fd, bytes, 0), 0);
    w.vq.log = &log;
    w.vq.used_log_addr = used;
    CHECK_EQUAL(virtqueue_start(&w.vq, 7), 0);
    CHECK(!log.changed); /* there was no other */
    w.vq.record = &record;
    CHECK_EQUAL(virtqueue_start(&w.vq, 7), 0);
    for (uint64_t page = 0; page < 8 * bytes; page++)
        CHECK_EQUAL(log.bits[page / 8] >> page % 8 & 1, page >= first && page <= last);
    dirty_log_unmap(&log);
    end(&w);
}

int main(void)
{
    test("places of the rings", places);
    test("heads", heads);
    test("indices wrap", indices_wrap);
    test("bad indices", bad_indices);
    test("direct chains", direct_chains);
    test("indirect chains", indirect_chains);
    test("notifications without EVENT_IDX", notify_without_event_idx);
    test("notifications with EVENT_IDX", notify_with_event_idx);
    test("a ring taken away", ring_taken_away);
    test("a former process's ring is logged", a_former_process_s_ring_is_logged);
    return tests_end();
}
