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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct packed_driver ring;
    static struct virtqueue vq;
    struct choices c = {data, size};
    struct vs_region both[2];
    struct mem_table *pinned[4] = {NULL};
    if (!guest.base)
        guest = guest_make(MEMORY_BYTES);
    guest.taken = 0;
    memset(guest.base, 0, 0x10000);
    ENSURE(guest_memory_init(&memory, on_gone) == 0);
    both[0] = guest_region(&guest, 0, BORDER);
    both[1] = guest_region(&guest, BORDER, MEMORY_BYTES - BORDER);
    ENSURE(guest_memory_set(&memory, both, 2) == 0);

    uint32_t num = choose(&c, 2) ? 1 + choose(&c, 300) : 1u << (8 - choose(&c, 9));
    uint16_t at = some_place(&c, num);
    ring = packed_make(&guest, num, at);
    struct blk_limits limits = {
        .capacity_bytes = CAPACITY, .block_bytes = choose(&c, 4) == 3 ? 4096 : 512, .read_only = choose(&c, 8) == 7};
    virtqueue_reset(&vq);
    ENSURE(virtqueue_choose_layout(&vq, true) == 0);
    vq.num = num;
    vq.desc_user = mostly(&c, USER_ADDR + ring.desc_at);
    vq.avail_user = mostly(&c, USER_ADDR + ring.driver_at);
    vq.used_user = mostly(&c, USER_ADDR + ring.device_at);
    vq.indirect = choose(&c, 4) != 3;
    vq.event_idx = choose(&c, 2) != 1;
    struct driver driver = {.guest = &guest,
                            .desc_at = ring.desc_at,
                            .num = num,
                            .packed = &ring,
                            .choices = &c,
                            .header_at = 0x8000,
                            .header_room = 0x4000,
                            .table_at = 0xc000,
                            .table_room = 0x4000,
                            .data_at = BORDER - 0x8000,
                            .data_room = 0x10000,
                            .capacity_bytes = CAPACITY,
                            .indirect = vq.indirect};
    leave_record(&c, num, at);
    vq.record = choose(&c, 2) ? &record : NULL;
    bool runs = virtqueue_map(&vq, memory.current) && virtqueue_start(&vq, (uint32_t)mostly(&c, at * 0x10001u)) == 0;

    while (c.left > 0) {
        unsigned burst = 1 + choose(&c, 4), id;
        uint32_t written;
        if (rarely(&c)) {
            unsigned i = choose(&c, 4);
            if (!pinned[i])
                pinned[i] = mem_table_pin(&memory);
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
    for (int i = 0; i < 4; i++)
        if (pinned[i])
            mem_table_unpin(&memory, pinned[i]);
    guest_memory_free(&memory);
    ENSURE(removals_asked == removals_done);
    return 0;
}
