/* SPDX-License-Identifier: Apache-2.0
 *
 * Packed rings, as fuzz_ring.c has split ones. Beside what holds there: no more
 * descriptors are at work than the ring has, and a record that a process leaves
 * at any point is one that the next can begin with.
 */
#include "ring_checks.h"

#include "inflight_packed.h"

static struct inflight_packed record;

/* The record as a process that died, or a hostile frontend, may have left it: chains of the first entries, the others
 * free, and a batch that was shown or not. */
static void leave_record(struct choices *c, uint32_t num, uint16_t used)
{
    static struct inflight_packed_state state;
    static struct inflight_packed_chain found[VS_MAX_QUEUE_SIZE];
    struct vring_packed_desc d[4] = {{.addr = GUEST_ADDR + 0x8000, .len = 16}};
    uint16_t last, entry = 0;
    memset(&record, 0, sizeof record);
    if (choose(c, 2) == 0)
        return;
    (void)inflight_packed_recover(&record, &state, num, d, &used, found);
    for (unsigned n = choose(c, 4); n > 0; n--) {
        for (unsigned i = 0; i < 4; i++)
            d[i] = (struct vring_packed_desc){.addr = mostly(c, GUEST_ADDR + 0x8000),
                                              .len = (uint32_t)mostly(c, 16),
                                              .id = (uint16_t)mostly(c, n % num),
                                              .flags = (uint16_t)mostly(c, i == 3 ? VRING_DESC_F_WRITE : 0)};
        entry = inflight_packed_taken(&record, &state, 1 + choose(c, 4), d, &last);
        if (rarely(c)) {
            inflight_packed_answered(&record, &state, entry, last);
            inflight_packed_showing(&record, &state, (uint16_t)mostly(c, used));
        }
    }
    record.version = (uint16_t)mostly(c, INFLIGHT_VERSION);
}

static void poke_record(struct choices *c)
{
    if (rarely(c)) /* mostly about its beginning */
        ((uint8_t *)&record)[choose_raw(c, 2) % (choose(c, 4) ? 256 : sizeof record)] = (uint8_t)choose_raw(c, 1);
}

static uint16_t some_place(struct choices *c, uint32_t num)
{
    return (uint16_t)(choose_raw(c, 2) % num | (choose(c, 2) ? 0 : PACKED_WRAP));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct packed_driver ring;
    static struct virtqueue vq;
    struct choices c = {data, size};
    begin_memory();
    uint32_t num = choose(&c, 2) ? 1 + choose(&c, 300) : 1u << (8 - choose(&c, 9));
    uint16_t at = some_place(&c, num);
    ring = packed_make(&guest, num, at);
    struct blk_limits limits = some_limits(&c);
    virtqueue_reset(&vq);
    ENSURE(virtqueue_choose_layout(&vq, true) == 0);
    vq.num = num;
    vq.desc_user = mostly(&c, USER_ADDR + ring.desc_at);
    vq.avail_user = mostly(&c, USER_ADDR + ring.driver_at);
    vq.used_user = mostly(&c, USER_ADDR + ring.device_at);
    vq.indirect = choose(&c, 4) != 3;
    vq.event_idx = choose(&c, 2) != 1;
    struct driver driver = driver_make(&guest, &c, BORDER - 0x8000, CAPACITY, vq.indirect);
    driver_use_packed(&driver, &ring);
    leave_record(&c, num, at);
    vq.record = choose(&c, 2) ? &record : NULL;
    bool runs = virtqueue_map(&vq, memory.current) && virtqueue_start(&vq, (uint32_t)mostly(&c, at * 0x10001u)) == 0;

    while (c.left > 0) {
        unsigned burst = 1 + choose(&c, 4), id;
        uint32_t written;
        if (rarely(&c)) {
            change_memory(&c);
            bool mapped = virtqueue_map(&vq, memory.current);
            if (!mapped && choose(&c, 2))
                virtqueue_unmap(&vq);
            runs = mapped && (runs || virtqueue_start(&vq, virtqueue_base(&vq)) == 0);
        }
        if (rarely(&c)) /* the next process, with what this one has left */
            runs = vq.mapped && virtqueue_start(&vq, (uint32_t)mostly(&c, virtqueue_base(&vq))) == 0;
        for (unsigned i = 0; i < burst; i++)
            driver_put_request(&driver);
        packed_publish(&ring);
        driver_poke(&driver);
        poke_record(&c);
        if (rarely(&c))
            *ring.driver = (struct vring_packed_desc_event){(uint16_t)choose_raw(&c, 2), (uint16_t)choose_raw(&c, 2)};
        runs = runs && serve_ring(&c, &driver, &vq, &limits, num);
        while (choose(&c, 4) && packed_reap(&ring, &id, &written))
            ;
        if (runs) {
            (void)virtqueue_show_used(&vq);
            (void)virtqueue_ask_for_kick(&vq);
            virtqueue_no_kicks(&vq);
        }
    }
    virtqueue_reset(&vq);
    end_memory();
    return 0;
}
