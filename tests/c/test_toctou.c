/* SPDX-License-Identifier: Apache-2.0
 *
 * A guest that rewrites what it has handed over, while the engine reads it: one
 * thread drives two rings with good requests, another one stores rubbish into
 * the descriptors, the indirect tables, the headers and the available rings.
 *
 * The guest's memory is two regions that neither begin nor end at a page, in a
 * file that has more: whoever reads or writes one byte too far meets the bytes
 * beside a region, which hold a secret. They must stay as they are, and must
 * never be found on a disk. Around each mapping that the engine makes lie pages
 * that nobody may touch (mmap is wrapped by the linker). Both disks must hold
 * the same all the while, since a write is captured once. And nothing may hang:
 * a ring goes on, or is broken and can be set up anew.
 *
 * VHOSTSYNC_TOCTOU_S: for so long (3 s). Not under ThreadSanitizer: the races are
 * the test.
 */
#define _GNU_SOURCE
#include "toctou.h"

static struct contest contest;

static void attach(struct rig *r)
{
    r->lanes = RACED_LANES;
    attach_guest(r, F_USUAL | F_INDIRECT);
    for (unsigned i = 0; i < RACED_LANES; i++) {
        struct lane *l = &r->lane[i];
        r->guest->taken = i ? HIGH_AT : LOW_AT; /* a ring in each region */
        *l = (struct lane){.ring = ring_make(r->guest, LANE_RING),
                           .indirect = i == 1,
                           .kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
                           .call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
        l->at = guest_take(r->guest, LANE_DEPTH * (SLOT_BYTES + 4096ull), 4096);
        CHECK(l->at + LANE_DEPTH * (SLOT_BYTES + 4096ull) <= part[i].at + part[i].bytes);
        l->ring.avail->flags = 0; /* tell me of every answer */
        l->ring.avail->idx = l->ring.used->idx = 0;
        lane_setup(r, i, 0);
    }
}

/* ---- the thread that rewrites ----------------------------------------------- */

static void rewrite_descriptor(struct racer *x, struct vring_desc *d)
{
    switch (pick(x, 8)) {
    case 0:
    case 1:
    case 2:
    case 3:
        FLICKER(x, d->addr, some_address(x, __atomic_load_n(&d->len, __ATOMIC_RELAXED)));
        break;
    case 4:
    case 5:
        FLICKER(x, d->len, some_length(x));
        break;
    case 6:
        FLICKER(x, d->flags, pick(x, 8));
        break;
    default:
        FLICKER(x, d->next, pick(x, pick(x, 8) ? LANE_RING : 65536));
    }
}

/* A table at the very end of a region, whose first descriptor goes on far beyond its length; and the length. */
static void hammer_table(struct racer *x)
{
    struct lane *l = &contest.rig.lane[1];
    struct vring_desc *d = &l->ring.desc[3 * pick(x, LANE_DEPTH)];
    uint64_t end = part[1].at + part[1].bytes;
    struct vring_desc last = {.addr = GUEST_ADDR + LOW_AT, .len = 16, .flags = VRING_DESC_F_NEXT, .next = 65000};
    memcpy(l->ring.guest->base + end - sizeof last, &last, sizeof last);
    for (int i = 0; i < 8000; i++) { /* all of it each time: the driver puts a good one there meanwhile */
        __atomic_store_n(&d->addr, GUEST_ADDR + end - sizeof last, __ATOMIC_RELAXED);
        __atomic_store_n(&d->flags, VRING_DESC_F_INDIRECT, __ATOMIC_RELAXED);
        __atomic_store_n(&d->len, i & 1 ? 16u : 16u * 65535, __ATOMIC_RELAXED);
    }
    x->stores += 24000;
}

static void rewrite(struct racer *x)
{
    struct lane *l = &contest.rig.lane[pick(x, RACED_LANES)];
    unsigned slot = (unsigned)pick(x, LANE_DEPTH);
    uint8_t *header = lane_header(l, slot);
    switch (pick(x, 16)) {
    case 0:
        FLICKER(x, l->ring.avail->ring[pick(x, LANE_RING)], pick(x, pick(x, 64) ? LANE_RING : 65536));
        break;
    case 1:
        if (pick(x, 64) == 0) /* ends the ring most of the time */
            __atomic_store_n(&l->ring.avail->idx, (uint16_t)test_random(&x->seed), __ATOMIC_RELAXED);
        break;
    case 2:
    case 3:
    case 4:
        rewrite_request(x, header, lane_data(l, slot));
        break;
    case 5:
        if (pick(x, 8) == 0)
            hammer_table(x);
        break;
    default:
        if (l->indirect)
            rewrite_descriptor(x, (struct vring_desc *)(void *)(header + 64) + pick(x, 3));
        else
            rewrite_descriptor(x, &l->ring.desc[3 * slot + pick(x, 3)]);
    }
}

/* ---- the driver -------------------------------------------------------------- */

static void take_answers(struct lane *l)
{
    struct vring_used_elem e;
    while (ring_reap(&l->ring, &e))
        l->done++;
}

/* As a driver does that resets its ring. All of the ring: reads whose descriptors were rewritten may have put the
 * disk's bytes anywhere into the guest's memory, its rings' flags and indices included, as it asked for. */
static void set_up_anew(struct contest *c, unsigned i)
{
    struct rig *r = &c->rig;
    struct lane *l = &r->lane[i];
    CHECK_EQUAL(rig_vring(r, VS_CMD_VRING_STOP, i, 0, -1), 0);
    take_answers(l);
    l->in_flight = 0;
    l->ring.published = l->ring.reaped;
    __atomic_store_n(&l->ring.avail->flags, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&l->ring.used->idx, l->ring.reaped, __ATOMIC_RELAXED);
    __atomic_store_n(&l->ring.avail->idx, l->ring.published, __ATOMIC_RELEASE);
    lane_setup(r, i, l->ring.published);
}

static void put_requests(struct lane *l, uint64_t *seed)
{
    while ((uint16_t)(l->ring.published - l->ring.reaped) < LANE_DEPTH) {
        struct good_request q = some_request(seed);
        lane_put(l, l->ring.published % LANE_DEPTH, q.type, q.sector, q.bytes);
    }
    ring_publish(&l->ring);
    lane_kick(l);
}

/* No answer and no breach for long is a hang. */
static void turn(struct contest *c, unsigned i, uint64_t *seed)
{
    struct rig *r = &c->rig;
    struct lane *l = &r->lane[i];
    struct vs_event e;
    uint64_t until = now_ms() + PATIENCE_MS, before = l->done;
    put_requests(l, seed);
    while (l->done == before && r->seen[VS_EV_QUEUE_BROKEN] == c->breaches) {
        CHECK(now_ms() < until);
        take_answers(l);
        (void)rig_event(r, &e, l->done == before ? 1 : 0);
    }
}

static void nothing_outside_is_touched_and_nothing_hangs(void)
{
    struct vs_engine_config config = rig_config();
    struct rig *r = &contest.rig;
    contest = (struct contest){.rig = rig_make(&config, rig_test_disk()), .racer = {.rewrite = rewrite}};
    attach(r);
    run_contest(&contest, turn, set_up_anew);
    printf("# %" PRIu64 " stores, %" PRIu64 " answers, %u broken rings\n", contest.racer.stores,
           r->lane[0].done + r->lane[1].done, contest.breaches);
    CHECK(r->lane[0].done > 0 && r->lane[1].done > 0);
    CHECK_EQUAL(lane_fill(&r->lane[0], 8, 4096, 0x42), VIRTIO_BLK_S_OK); /* and a good guest is served as ever */
    rig_end(r);
}

int main(void)
{
    return toctou_main(nothing_outside_is_touched_and_nothing_hangs);
}
