/* SPDX-License-Identifier: Apache-2.0
 *
 * Rings, chains, requests and memory tables, driven directly: no threads, no
 * I/O. Whatever a driver and a frontend do, what the parser accepts must lie in
 * the guest's memory and within the disk, and every request that was taken up
 * must be answerable.
 */
#include "blk_request.h"

#include "driver.h"

#define MEMORY_BYTES (1u << 20)
#define BORDER (MEMORY_BYTES / 2 + 0x123) /* two regions that touch, not at a page */
#define CAPACITY (1u << 18)
#define ENSURE(condition)                                                                          \
    do {                                                                                           \
        if (!(condition))                                                                          \
            __builtin_trap();                                                                      \
    } while (0)

static struct guest guest;
static struct guest_memory memory;
static uint64_t removals_asked, removals_done;

static void on_gone(struct guest_memory *m, uint64_t token)
{
    (void)m;
    ENSURE(token == 1);
    removals_done++;
}

static bool inside(const struct mem_table *t, const void *start, uint64_t bytes)
{
    const uint8_t *p = start;
    for (unsigned i = 0; i < t->count; i++) {
        const struct mem_region *r = t->region[i];
        if (p >= r->host && bytes <= r->bytes && (uint64_t)(p - r->host) <= r->bytes - bytes)
            return true;
    }
    return false;
}

static void touch(const struct mem_table *t, struct blk_request *q)
{
    static volatile uint8_t sink;
    for (int i = 0; i < q->iov_count; i++) {
        uint8_t *p = q->iov[i].iov_base;
        uint64_t n = q->iov[i].iov_len;
        ENSURE(n > 0 && inside(t, p, n));
        if (q->op == VS_OP_READ)
            p[0] = p[n - 1] = 0x5a;
        else
            sink = (uint8_t)(p[0] + p[n - 1]);
    }
}

static void check_request(const struct mem_table *t, struct blk_request *q, int verdict, const struct blk_limits *limits)
{
    ENSURE(inside(t, q->status, 1));
    ENSURE(q->iov_count >= 0 && q->iov_count <= REQUEST_IOV_MAX);
    if (verdict != BLK_OK)
        return;
    touch(t, q);
    if (q->op == VS_OP_READ || q->op == VS_OP_WRITE) {
        uint64_t sum = 0;
        for (int i = 0; i < q->iov_count; i++)
            sum += q->iov[i].iov_len;
        ENSURE(sum == q->length && sum <= VS_REQUEST_BYTES_MAX);
    }
    if (q->op == VS_OP_READ)
        ENSURE(q->writable_bytes == q->length + 1);
    if (q->op != VS_OP_FLUSH && q->op != VS_OP_OTHER) {
        ENSURE(q->length > 0 && q->offset % limits->block_bytes == 0 && q->length % limits->block_bytes == 0);
        ENSURE(q->offset <= limits->capacity_bytes && q->length <= limits->capacity_bytes - q->offset);
        ENSURE(q->op == VS_OP_READ || !limits->read_only);
    }
}

/* The table of memory changes under the ring, as frontends may do it. */
static void change_memory(struct choices *c)
{
    struct vs_region r = guest_region(&guest, 0, BORDER);
    struct vs_region high = guest_region(&guest, BORDER, MEMORY_BYTES - BORDER);
    switch (choose(c, 4)) {
    case 0: { /* a new table, mostly the same */
        struct vs_region both[2] = {r, high};
        for (int i = 0; i < 2; i++) {
            both[i].guest_addr = mostly(c, both[i].guest_addr);
            both[i].bytes = mostly(c, both[i].bytes);
            both[i].user_addr = mostly(c, both[i].user_addr);
            both[i].mmap_offset = mostly(c, both[i].mmap_offset);
        }
        (void)guest_memory_set(&memory, both, 2);
        return;
    }
    case 1:
        close(r.fd);
        high.guest_addr = mostly(c, high.guest_addr);
        high.bytes = mostly(c, high.bytes);
        if (guest_memory_remove(&memory, &high, 1) == 0)
            removals_asked++;
        return;
    case 2:
        close(r.fd);
        high.bytes = mostly(c, high.bytes);
        (void)guest_memory_add(&memory, &high);
        return;
    default:
        close(high.fd);
        if (guest_memory_remove(&memory, &r, 1) == 0)
            removals_asked++;
    }
}

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
    static struct blk_request request; /* as large as the engine's, and not zeroed */
    struct choices c = {data, size};
    struct vs_region both[2];
    struct mem_table *pinned[4] = {NULL};
    static struct inflight_ring record;
    uint16_t base, head;
    if (!guest.base)
        guest = guest_make(MEMORY_BYTES);
    guest.taken = 0;
    memset(guest.base, 0, 0x10000);
    ENSURE(guest_memory_init(&memory, on_gone) == 0);
    both[0] = guest_region(&guest, 0, BORDER);
    both[1] = guest_region(&guest, BORDER, MEMORY_BYTES - BORDER);
    ENSURE(guest_memory_set(&memory, both, 2) == 0);

    struct ring ring = ring_make(&guest, 1u << (8 - choose(&c, 9)));
    struct blk_limits limits = {.capacity_bytes = CAPACITY, .block_bytes = choose(&c, 4) == 3 ? 4096 : 512,
                                .read_only = choose(&c, 8) == 7};
    struct virtqueue vq = {.num = ring.num,
                           .desc_user = mostly(&c, USER_ADDR + ring.desc_at),
                           .avail_user = mostly(&c, USER_ADDR + ring.avail_at),
                           .used_user = mostly(&c, USER_ADDR + ring.used_at),
                           .indirect = choose(&c, 4) != 3,
                           .event_idx = choose(&c, 2) != 1};
    struct driver driver = {.ring = &ring, .choices = &c, .header_at = 0x8000, .header_room = 0x4000,
                            .table_at = 0xc000, .table_room = 0x4000, .data_at = BORDER - 0x8000,
                            .data_room = 0x10000, .capacity_bytes = CAPACITY, .indirect = vq.indirect};
    base = (uint16_t)choose_raw(&c, 2);
    ring.published = ring.reaped = base;
    ring.avail->idx = ring.used->idx = base;
    leave_record(&c, &record, &vq, base);
    vq.inflight = choose(&c, 2) ? &record : NULL;
    bool mapped = virtqueue_map(&vq, memory.current);
    if (mapped)
        virtqueue_start(&vq, (uint16_t)mostly(&c, base));

    while (c.left > 0) {
        unsigned burst = 1 + choose(&c, 4);
        if (rarely(&c)) {
            unsigned i = choose(&c, 4);
            if (!pinned[i])
                pinned[i] = mem_table_pin(&memory);
            change_memory(&c);
            mapped = virtqueue_map(&vq, memory.current);
            if (mapped && choose(&c, 2))
                virtqueue_start(&vq, vq.next_avail);
        }
        for (unsigned i = 0; i < burst; i++)
            driver_put_request(&driver);
        ring_publish(&ring);
        if (rarely(&c))
            ring.avail->idx = (uint16_t)mostly(&c, ring.avail->idx);
        driver_poke(&driver);
        poke_record(&c, &record);
        for (unsigned budget = 0; mapped && budget < ring.num; budget++) {
            int rc = virtqueue_peek(&vq, &head);
            if (rc <= 0) {
                mapped = rc == 0; /* a broken ring stays so until it is set up anew */
                break;
            }
            ENSURE(head < vq.num);
            virtqueue_take(&vq, head);
            rc = blk_request_parse(&request, &vq, memory.current, head, &limits);
            if (rc < 0) {
                ENSURE(-rc > VS_BREACH_NONE && -rc <= VS_BREACH_NO_STATUS);
                mapped = false;
                break;
            }
            check_request(memory.current, &request, rc, &limits);
            driver_poke(&driver);
            *request.status = (uint8_t)rc;
            virtqueue_push(&vq, head, request.writable_bytes);
            if (choose(&c, 2))
                (void)virtqueue_show_used(&vq);
        }
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
