/* SPDX-License-Identifier: Apache-2.0
 *
 * Split rings, chains, requests and memory tables, driven directly: no threads, no
 * I/O. Whatever a driver and a frontend do, what the parser accepts must lie in
 * the guest's memory and within the disk, and every request that was taken up
 * must be answerable.
 */
#include "ring_checks.h"

/* The record of requests in flight, as a process that died, or a hostile frontend, may have left it. */
static void leave_record(struct choices *c, struct inflight_ring *r, const struct virtqueue *vq, uint16_t used_idx)
{
    memset(r, 0, sizeof *r);
    if (choose(c, 2) == 0)
        return;
    r->version = (uint16_t)mostly(c, INFLIGHT_VERSION);
    r->desc_num = (uint16_t)mostly(c, VS_MAX_QUEUE_SIZE);
    r->used_idx = (uint16_t)mostly(c, (uint16_t)(used_idx - choose(c, 4)));
    r->last_batch_head = (uint16_t)mostly(c, choose(c, 256) % vq->num);
    for (unsigned n = choose(c, 16); n > 0; n--) {
        struct inflight_desc *d = &r->desc[choose(c, 256) % vq->num];
        d->inflight = (uint8_t)mostly(c, 1);
        d->next = (uint16_t)mostly(c, choose(c, 256) % vq->num);
        d->counter = mostly(c, n);
    }
}

static void poke_record(struct choices *c, struct inflight_ring *r)
{
    if (rarely(c))
        ((uint8_t *)r)[choose_raw(c, 2) % sizeof *r] = (uint8_t)choose_raw(c, 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct choices c = {data, size};
    struct vs_region both[2];
    struct mem_table *pinned[4] = {NULL};
    static struct inflight_ring record;
    uint16_t base;
    if (!guest.base)
        guest = guest_make(MEMORY_BYTES);
    guest.taken = 0;
    memset(guest.base, 0, 0x10000);
    ENSURE(guest_memory_init(&memory, on_gone) == 0);
    both[0] = guest_region(&guest, 0, BORDER);
    both[1] = guest_region(&guest, BORDER, MEMORY_BYTES - BORDER);
    ENSURE(guest_memory_set(&memory, both, 2) == 0);

    struct ring ring = ring_make(&guest, 1u << (8 - choose(&c, 9)));
    struct blk_limits limits = {
        .capacity_bytes = CAPACITY, .block_bytes = choose(&c, 4) == 3 ? 4096 : 512, .read_only = choose(&c, 8) == 7};
    struct virtqueue vq = {.layout = &ring_split,
                           .num = ring.num,
                           .desc_user = mostly(&c, USER_ADDR + ring.desc_at),
                           .avail_user = mostly(&c, USER_ADDR + ring.avail_at),
                           .used_user = mostly(&c, USER_ADDR + ring.used_at),
                           .indirect = choose(&c, 4) != 3,
                           .event_idx = choose(&c, 2) != 1};
    struct driver driver = {.guest = &guest,
                            .desc_at = ring.desc_at,
                            .num = ring.num,
                            .ring = &ring,
                            .choices = &c,
                            .header_at = 0x8000,
                            .header_room = 0x4000,
                            .table_at = 0xc000,
                            .table_room = 0x4000,
                            .data_at = BORDER - 0x8000,
                            .data_room = 0x10000,
                            .capacity_bytes = CAPACITY,
                            .indirect = vq.indirect};
    base = (uint16_t)choose_raw(&c, 2);
    ring.published = ring.reaped = base;
    ring.avail->idx = ring.used->idx = base;
    leave_record(&c, &record, &vq, base);
    vq.record = choose(&c, 2) ? &record : NULL;
    bool mapped = virtqueue_map(&vq, memory.current);
    if (mapped)
        (void)virtqueue_start(&vq, (uint16_t)mostly(&c, base));

    while (c.left > 0) {
        unsigned burst = 1 + choose(&c, 4);
        if (rarely(&c)) {
            unsigned i = choose(&c, 4);
            if (!pinned[i])
                pinned[i] = mem_table_pin(&memory);
            change_memory(&c);
            mapped = virtqueue_map(&vq, memory.current);
            if (!mapped) /* nothing of it is in flight */
                virtqueue_unmap(&vq);
            if (mapped && choose(&c, 2))
                (void)virtqueue_start(&vq, vq.next_avail);
        }
        for (unsigned i = 0; i < burst; i++)
            driver_put_request(&driver);
        ring_publish(&ring);
        if (rarely(&c))
            ring.avail->idx = (uint16_t)mostly(&c, ring.avail->idx);
        driver_poke(&driver);
        poke_record(&c, &record);
        mapped = mapped && serve_ring(&c, &driver, &vq, &limits, ring.num);
        if (vq.used) {
            (void)virtqueue_show_used(&vq);
            (void)virtqueue_ask_for_kick(&vq);
            virtqueue_no_kicks(&vq);
        }
    }
    for (int i = 0; i < 4; i++)
        if (pinned[i])
            mem_table_unpin(&memory, pinned[i]);
    guest_memory_free(&memory);
    ENSURE(removals_asked == removals_done);
    return 0;
}
