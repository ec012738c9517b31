/* SPDX-License-Identifier: Apache-2.0
 *
 * What must hold of whatever the parser accepts, and a table of memory that
 * changes under the ring: for rings of either layout.
 */
#ifndef VS_FUZZ_RING_CHECKS_H
#define VS_FUZZ_RING_CHECKS_H

#include "blk_request.h"
#include "driver.h"

#define MEMORY_BYTES (1u << 20)
#define BORDER (MEMORY_BYTES / 2 + 0x123) /* two regions that touch, not at a page */
#define CAPACITY (1u << 18)
#define ENSURE(condition)     \
    do {                      \
        if (!(condition))     \
            __builtin_trap(); \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct guest guest;
static struct guest_memory memory;
static struct mem_table *pinned[4]; /* former ones, as requests in flight pin them */
static uint64_t removals_asked, removals_done;

static void on_gone(struct guest_memory *m, uint64_t token)
{
    (void)m;
    ENSURE(token == 1);
    removals_done++;
}

static void begin_memory(void)
{
    if (!guest.base)
        guest = guest_make(MEMORY_BYTES);
    guest.taken = 0;
    memset(guest.base, 0, 0x10000);
    ENSURE(guest_memory_init(&memory, on_gone) == 0);
    struct vs_region both[2] = {guest_region(&guest, 0, BORDER), guest_region(&guest, BORDER, MEMORY_BYTES - BORDER)};
    ENSURE(guest_memory_set(&memory, both, 2) == 0);
}

static void end_memory(void)
{
    for (int i = 0; i < 4; i++) {
        if (pinned[i])
            mem_table_unpin(&memory, pinned[i]);
        pinned[i] = NULL;
    }
    guest_memory_free(&memory);
    ENSURE(removals_asked == removals_done);
}

static struct blk_limits some_limits(struct choices *c)
{
    uint32_t block_bytes = choose(c, 4) == 3 ? 4096 : 512;
    return (struct blk_limits){.capacity_bytes = CAPACITY, .block_bytes = block_bytes, .read_only = choose(c, 8) == 7};
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

static void check_request(const struct mem_table *t, struct blk_request *q, int verdict,
                          const struct blk_limits *limits)
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

/* The table of memory changes under the ring, as frontends may do it; the former one may stay pinned. */
static void change_memory(struct choices *c)
{
    unsigned place = choose(c, 4);
    if (!pinned[place])
        pinned[place] = mem_table_pin(&memory);
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

/* Takes up what there is, up to "budget". False: the ring is broken, until it is set up anew. */
static bool serve_ring(struct choices *c, struct driver *driver, struct virtqueue *vq, const struct blk_limits *limits,
                       unsigned budget)
{
    static struct blk_request request; /* as large as the engine's, and not zeroed */
    uint16_t chain;
    for (; budget > 0; budget--) {
        int rc = virtqueue_peek(vq, &chain);
        if (rc <= 0)
            return rc == 0;
        ENSURE(chain < vq->num);
        virtqueue_take(vq, chain);
        rc = blk_request_parse(&request, vq, memory.current, chain, limits);
        if (rc < 0) {
            ENSURE(-rc > VS_BREACH_NONE && -rc <= VS_BREACH_NO_STATUS);
            return false;
        }
        check_request(memory.current, &request, rc, limits);
        driver_poke(driver);
        *request.status = (uint8_t)rc;
        virtqueue_push(vq, chain, request.writable_bytes);
        if (choose(c, 2))
            (void)virtqueue_show_used(vq);
    }
    return true;
}

#endif
