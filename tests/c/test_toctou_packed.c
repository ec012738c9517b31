/* SPDX-License-Identifier: Apache-2.0
 *
 * As test_toctou.c, with packed rings: another thread stores rubbish into the
 * ring's descriptors (their IDs and the bits that make them available, too), the
 * indirect tables, the headers and the event suppression.
 *
 * A list that was read longer or shorter than the driver has made it leaves the
 * two at different places in the ring. That is the guest's own loss: here it
 * sets the ring up anew when it gets no further. The engine must answer to that.
 */
#define _GNU_SOURCE
#include "toctou.h"

#include <linux/virtio_config.h>

#include "packed_driver.h"

#define RING 50u /* no power of two */
#define DEPTH 12u
#define STANDSTILL_MS 40

struct packed_lane {
    struct packed_driver ring;
    bool indirect;
    int kick_fd, call_fd;
    uint64_t at;   /* slots: header, status and data */
    unsigned busy; /* slots, as bits */
    uint64_t done;
};

struct stage {
    struct rig rig;
    struct packed_lane lane[RACED_LANES];
    struct racer racer;
    unsigned breaches;
    uint64_t lost;
};

static uint8_t *slot_at(struct packed_lane *l, unsigned slot)
{
    return l->ring.guest->base + l->at + slot * 12288ull;
}

static void start_ring(struct stage *s, unsigned i)
{
    struct packed_lane *l = &s->lane[i];
    struct rig *r = &s->rig;
    struct vs_command addr = {.kind = VS_CMD_VRING_ADDR,
                              .attachment = r->attachment,
                              .queue = i,
                              .fd = -1,
                              .ring.desc = USER_ADDR + l->ring.desc_at,
                              .ring.avail = USER_ADDR + l->ring.driver_at,
                              .ring.used = USER_ADDR + l->ring.device_at,
                              .ring.log = UINT64_MAX};
    memset(l->ring.desc, 0, RING * sizeof *l->ring.desc);
    memset(l->ring.driver, 0, sizeof *l->ring.driver);
    l->ring.avail = l->ring.used = WRAP;
    l->ring.hidden = RING;
    l->busy = 0;
    CHECK_EQUAL(rig_vring(r, VS_CMD_VRING_NUM, i, RING, -1), 0);
    CHECK_EQUAL(rig_command(r, addr), 0);
    CHECK_EQUAL(rig_vring(r, VS_CMD_VRING_BASE, i, WRAP, -1), 0);
    CHECK_EQUAL(rig_vring(r, VS_CMD_VRING_CALL, i, 0, dup(l->call_fd)), 0);
    CHECK_EQUAL(rig_vring(r, VS_CMD_VRING_KICK, i, 0, dup(l->kick_fd)), 0);
    CHECK_EQUAL(rig_vring(r, VS_CMD_VRING_ENABLE, i, 1, -1), 0);
}

static void set_up_anew(struct stage *s, unsigned i)
{
    CHECK_EQUAL(rig_vring(&s->rig, VS_CMD_VRING_STOP, i, 0, -1), 0);
    start_ring(s, i);
}

static void attach(struct stage *s)
{
    struct rig *r = &s->rig;
    r->guest = malloc(sizeof *r->guest);
    CHECK(r->guest);
    *r->guest = guest_make(FILE_BYTES);
    hide_secret(r->guest);
    CHECK_EQUAL(rig_simple(r, VS_CMD_ATTACH, 0), 0);
    CHECK_EQUAL(rig_simple(r, VS_CMD_SET_FEATURES, F_USUAL | F_INDIRECT | 1ull << VIRTIO_F_RING_PACKED), 0);
    set_table(r);
    for (unsigned i = 0; i < RACED_LANES; i++) {
        struct packed_lane *l = &s->lane[i];
        r->guest->taken = i ? HIGH_AT : LOW_AT; /* a ring in each region */
        l->ring = packed_make(r->guest, RING, WRAP);
        l->indirect = i == 1;
        l->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        l->call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        l->at = guest_take(r->guest, DEPTH * 12288ull, 4096);
        start_ring(s, i);
    }
}

/* ---- the thread that rewrites ----------------------------------------------- */

static void rewrite_descriptor(struct racer *x, struct vring_packed_desc *d)
{
    switch (pick(x, 8)) {
    case 0:
    case 1:
    case 2:
        FLICKER(x, d->addr, some_address(x, __atomic_load_n(&d->len, __ATOMIC_RELAXED)));
        break;
    case 3:
    case 4:
        FLICKER(x, d->len, some_length(x));
        break;
    case 5:
        FLICKER(x, d->id, pick(x, pick(x, 8) ? DEPTH : 65536));
        break;
    case 6:
        FLICKER(x, d->flags, __atomic_load_n(&d->flags, __ATOMIC_RELAXED) ^ (1u << pick(x, 16)));
        break;
    default:
        FLICKER(x, d->flags, pick(x, 65536));
    }
}

/* A table at the very end of a region, which is now one descriptor long and now goes on far beyond. */
static void hammer_table(struct racer *x, struct packed_lane *l)
{
    struct vring_packed_desc *d = &l->ring.desc[pick(x, RING)];
    uint64_t end = part[1].at + part[1].bytes;
    struct vring_packed_desc last = {.addr = GUEST_ADDR + LOW_AT, .len = 16};
    memcpy(l->ring.guest->base + end - sizeof last, &last, sizeof last);
    for (int i = 0; i < 8000; i++) {
        __atomic_store_n(&d->addr, GUEST_ADDR + end - sizeof last, __ATOMIC_RELAXED);
        __atomic_store_n(&d->len, i & 1 ? 16u : 16u * 1024, __ATOMIC_RELAXED);
    }
    x->stores += 16000;
}

static void *race(void *argument)
{
    struct stage *s = argument;
    struct racer *x = &s->racer;
    while (!atomic_load_explicit(&x->stop, memory_order_relaxed)) {
        struct packed_lane *l = &s->lane[pick(x, RACED_LANES)];
        uint8_t *header = slot_at(l, (unsigned)pick(x, DEPTH));
        switch (pick(x, 16)) {
        case 0:
            FLICKER(x, *(uint32_t *)(void *)l->ring.driver, test_random(&x->seed));
            break;
        case 1:
            FLICKER(x, *(uint32_t *)(void *)header, pick(x, 16));
            break;
        case 2:
            FLICKER(x, *(uint64_t *)(void *)(header + 8),
                    pick(x, 4) ? pick(x, 2 * DISK_BYTES / 512) : test_random(&x->seed));
            break;
        case 3:
            __atomic_store_n((uint64_t *)(void *)(header + 4096 + 8 * pick(x, 512)), pick(x, 0x7f), __ATOMIC_RELAXED);
            break;
        case 4:
            if (pick(x, 8) == 0)
                hammer_table(x, &s->lane[1]);
            break;
        default:
            if (l->indirect && pick(x, 2))
                rewrite_descriptor(x, (struct vring_packed_desc *)(void *)(header + 64) + pick(x, 3));
            else
                rewrite_descriptor(x, &l->ring.desc[pick(x, RING)]);
        }
    }
    return NULL;
}

/* ---- the driver -------------------------------------------------------------- */

static void put_request(struct packed_lane *l, unsigned slot, uint32_t type, uint64_t sector, uint32_t bytes)
{
    struct virtio_blk_outhdr header = {.type = type, .sector = sector};
    uint8_t *memory = slot_at(l, slot);
    uint64_t at = GUEST_ADDR + (uint64_t)(memory - l->ring.guest->base);
    struct vring_packed_desc list[3], table;
    unsigned n = 0;
    memcpy(memory, &header, sizeof header);
    memory[16] = 0xff;
    list[n++] = (struct vring_packed_desc){.addr = at, .len = 16};
    if (bytes)
        list[n++] = (struct vring_packed_desc){
            .addr = at + 4096, .len = bytes, .flags = type == VIRTIO_BLK_T_IN ? VRING_DESC_F_WRITE : 0};
    list[n++] = (struct vring_packed_desc){.addr = at + 16, .len = 1, .flags = VRING_DESC_F_WRITE};
    if (l->indirect) {
        memcpy(memory + 64, list, sizeof list);
        table = (struct vring_packed_desc){.addr = at + 64, .len = 16 * n, .flags = VRING_DESC_F_INDIRECT};
        packed_put(&l->ring, &table, 1, slot);
    } else {
        packed_put(&l->ring, list, n, slot);
    }
    l->busy |= 1u << slot;
}

static void put_requests(struct packed_lane *l, uint64_t *seed)
{
    static const uint32_t types[] = {VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_FLUSH};
    uint64_t one = 1;
    for (unsigned slot = 0; slot < DEPTH; slot++) {
        uint32_t type = types[test_random(seed) % 4], bytes = 512u * (1 + (uint32_t)(test_random(seed) % 8));
        if (!(l->busy & 1u << slot))
            put_request(l, slot, type, test_random(seed) % (DISK_BYTES / 512 - 8),
                        type == VIRTIO_BLK_T_FLUSH ? 0 : bytes);
    }
    packed_publish(&l->ring);
    if (write(l->kick_fd, &one, sizeof one) < 0)
        CHECK(errno == EAGAIN);
}

static void take_answers(struct packed_lane *l)
{
    unsigned id;
    uint32_t written;
    while (packed_reap(&l->ring, &id, &written)) {
        if (id < DEPTH)
            l->busy &= ~(1u << id);
        l->done++;
    }
}

static void turn(struct stage *s, unsigned i, uint64_t *seed)
{
    struct packed_lane *l = &s->lane[i];
    struct rig *r = &s->rig;
    struct vs_event e;
    uint64_t until = now_ms() + STANDSTILL_MS, before = l->done;
    put_requests(l, seed);
    while (l->done == before && r->seen[VS_EV_QUEUE_BROKEN] == s->breaches && now_ms() < until) {
        take_answers(l);
        (void)rig_event(r, &e, l->done == before ? 1 : 0);
    }
    if (l->done == before && r->seen[VS_EV_QUEUE_BROKEN] == s->breaches) {
        s->lost++;
        set_up_anew(s, i);
    }
    while (s->breaches != r->seen[VS_EV_QUEUE_BROKEN]) {
        s->breaches = r->seen[VS_EV_QUEUE_BROKEN];
        for (unsigned k = 0; k < RACED_LANES; k++)
            set_up_anew(s, k);
    }
}

static void good_request(struct stage *s)
{
    struct packed_lane *l = &s->lane[0];
    uint64_t until = now_ms() + PATIENCE_MS, before = l->done, one = 1;
    memset(slot_at(l, 0) + 4096, 0x42, 4096);
    put_request(l, 0, VIRTIO_BLK_T_OUT, 8, 4096);
    packed_publish(&l->ring);
    CHECK(write(l->kick_fd, &one, sizeof one) == sizeof one);
    while (l->done == before) {
        CHECK(now_ms() < until);
        take_answers(l);
    }
    CHECK_EQUAL(slot_at(l, 0)[16], VIRTIO_BLK_S_OK);
}

static void nothing_outside_is_touched_and_nothing_hangs(void)
{
    const char *wanted = getenv("VHOSTSYNC_TOCTOU_S");
    struct vs_engine_config config = rig_config();
    static struct stage s;
    uint64_t seed = 5, end;
    s = (struct stage){.rig = rig_make(&config, rig_test_disk()), .racer = {.seed = 77}};
    attach(&s);
    rig_mirror(&s.rig);
    CHECK_EQUAL(pthread_create(&s.racer.thread, NULL, race, &s), 0);
    end = now_ms() + 1000 * (wanted ? strtoull(wanted, NULL, 10) : 3);
    for (unsigned n = 0; now_ms() < end; n++) {
        turn(&s, n % RACED_LANES, &seed);
        if (n % 500 == 0)
            set_table(&s.rig); /* while requests of the former table are under way */
    }
    atomic_store(&s.racer.stop, true);
    pthread_join(s.racer.thread, NULL);
    for (unsigned i = 0; i < RACED_LANES; i++)
        set_up_anew(&s, i);
    CHECK_EQUAL(rig_simple(&s.rig, VS_CMD_MIRROR_DRAIN, 0), 0);
    CHECK_EQUAL(s.rig.state, VS_STEADY);
    CHECK(disks_equal(s.rig.source, s.rig.destination, CUT_NONE));
    check_secret(&s.rig);
    printf("# %" PRIu64 " stores, %" PRIu64 " answers, %u broken rings, %" PRIu64 " set up anew\n", s.racer.stores,
           s.lane[0].done + s.lane[1].done, s.rig.seen[VS_EV_QUEUE_BROKEN], s.lost);
    CHECK(s.lane[0].done > 0 && s.lane[1].done > 0 && s.rig.seen[VS_EV_QUEUE_BROKEN] > 0);
    good_request(&s);
    for (unsigned i = 0; i < RACED_LANES; i++) {
        close(s.lane[i].kick_fd);
        close(s.lane[i].call_fd);
    }
    rig_end(&s.rig); /* which has no lanes of its own */
}

int main(void)
{
#if defined(__SANITIZE_THREAD__)
    printf("1..0 # SKIP the races are the test\n");
    return 0;
#else
    test("nothing outside is touched and nothing hangs", nothing_outside_is_touched_and_nothing_hangs);
    return tests_end();
#endif
}
