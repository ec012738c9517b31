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

static struct contest contest;
static struct packed_lane lanes[RACED_LANES];
static uint64_t standstills;

static uint8_t *slot_at(struct packed_lane *l, unsigned slot)
{
    return l->ring.guest->base + l->at + slot * 12288ull;
}

static void start_ring(struct rig *r, unsigned i)
{
    struct packed_lane *l = &lanes[i];
    struct ring_place place = {.num = RING,
                               .desc_at = l->ring.desc_at,
                               .avail_at = l->ring.driver_at,
                               .used_at = l->ring.device_at,
                               .kick_fd = l->kick_fd,
                               .call_fd = l->call_fd};
    memset(l->ring.desc, 0, RING * sizeof *l->ring.desc);
    memset(l->ring.driver, 0, sizeof *l->ring.driver);
    l->ring.avail = l->ring.used = WRAP;
    l->ring.hidden = RING;
    l->busy = 0;
    rig_start_ring(r, i, &place, WRAP);
}

static void set_up_anew(struct contest *c, unsigned i)
{
    CHECK_EQUAL(rig_vring(&c->rig, VS_CMD_VRING_STOP, i, 0, -1), 0);
    start_ring(&c->rig, i);
}

static void attach(struct rig *r)
{
    attach_guest(r, F_USUAL | F_INDIRECT | 1ull << VIRTIO_F_RING_PACKED);
    for (unsigned i = 0; i < RACED_LANES; i++) {
        struct packed_lane *l = &lanes[i];
        r->guest->taken = i ? HIGH_AT : LOW_AT; /* a ring in each region */
        l->ring = packed_make(r->guest, RING, WRAP);
        l->indirect = i == 1;
        l->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        l->call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        l->at = guest_take(r->guest, DEPTH * 12288ull, 4096);
        start_ring(r, i);
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

static void rewrite(struct racer *x)
{
    struct packed_lane *l = &lanes[pick(x, RACED_LANES)];
    uint8_t *header = slot_at(l, (unsigned)pick(x, DEPTH));
    switch (pick(x, 16)) {
    case 0:
        FLICKER(x, *(uint32_t *)(void *)l->ring.driver, test_random(&x->seed));
        break;
    case 1:
    case 2:
    case 3:
        rewrite_request(x, header, header + 4096);
        break;
    case 4:
        if (pick(x, 8) == 0)
            hammer_table(x, &lanes[1]);
        break;
    default:
        if (l->indirect && pick(x, 2))
            rewrite_descriptor(x, (struct vring_packed_desc *)(void *)(header + 64) + pick(x, 3));
        else
            rewrite_descriptor(x, &l->ring.desc[pick(x, RING)]);
    }
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
    uint64_t one = 1;
    for (unsigned slot = 0; slot < DEPTH; slot++) {
        struct good_request q = some_request(seed);
        if (!(l->busy & 1u << slot))
            put_request(l, slot, q.type, q.sector, q.bytes);
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

static void turn(struct contest *c, unsigned i, uint64_t *seed)
{
    struct packed_lane *l = &lanes[i];
    struct rig *r = &c->rig;
    struct vs_event e;
    uint64_t until = now_ms() + STANDSTILL_MS, before = l->done;
    put_requests(l, seed);
    while (l->done == before && r->seen[VS_EV_QUEUE_BROKEN] == c->breaches && now_ms() < until) {
        take_answers(l);
        (void)rig_event(r, &e, l->done == before ? 1 : 0);
    }
    if (l->done == before && r->seen[VS_EV_QUEUE_BROKEN] == c->breaches) {
        standstills++;
        set_up_anew(c, i);
    }
}

static void serve_good_request(void)
{
    struct packed_lane *l = &lanes[0];
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
    struct vs_engine_config config = rig_config();
    contest = (struct contest){.rig = rig_make(&config, rig_test_disk()), .racer = {.rewrite = rewrite}};
    attach(&contest.rig);
    run_contest(&contest, turn, set_up_anew);
    printf("# %" PRIu64 " stores, %" PRIu64 " answers, %u broken rings, %" PRIu64 " set up anew\n",
           contest.racer.stores, lanes[0].done + lanes[1].done, contest.breaches, standstills);
    CHECK(lanes[0].done > 0 && lanes[1].done > 0);
    serve_good_request();
    for (unsigned i = 0; i < RACED_LANES; i++) {
        close(lanes[i].kick_fd);
        close(lanes[i].call_fd);
    }
    rig_end(&contest.rig); /* which has no lanes of its own */
}

int main(void)
{
    return toctou_main(nothing_outside_is_touched_and_nothing_hangs);
}
