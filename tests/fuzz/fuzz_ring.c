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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct choices c = {data, size};
    static struct inflight_ring record;
    uint16_t base;
    begin_memory();
    struct ring ring = ring_make(&guest, 1u << (8 - choose(&c, 9)));
    struct blk_limits limits = some_limits(&c);
    struct virtqueue vq = {.layout = &ring_split,
                           .num = ring.num,
                           .desc_user = mostly(&c, USER_ADDR + ring.desc_at),
                           .avail_user = mostly(&c, USER_ADDR + ring.avail_at),
                           .used_user = mostly(&c, USER_ADDR + ring.used_at),
                           .indirect = choose(&c, 4) != 3,
                           .event_idx = choose(&c, 2) != 1};
    struct driver driver = driver_make(&guest, &c, BORDER - 0x8000, CAPACITY, vq.indirect);
    driver_use_ring(&driver, &ring);
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
    end_memory();
    return 0;
}
