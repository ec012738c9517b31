/* SPDX-License-Identifier: Apache-2.0
 *
 * A driver's side of a split virtqueue, over guest memory in a memfd, as the
 * tests and the fuzzers need it (virtio 1.x, 2.7 and 5.2.6).
 */
#ifndef VS_TEST_RING_H
#define VS_TEST_RING_H

#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#include "harness.h"
#include "shim.h"

/* Where the guest and the frontend see the memory: both far from 0 and from each other. */
#define GUEST_ADDR 0x100000000ull
#define USER_ADDR 0x7f0000000000ull

struct guest {
    int fd;
    uint8_t *base;
    uint64_t bytes;
    uint64_t taken; /* by guest_take() */
};

static inline struct guest guest_make(uint64_t bytes)
{
    struct guest g = {.bytes = bytes};
    g.fd = memfd_create("guest", MFD_CLOEXEC);
    CHECK(g.fd >= 0);
    CHECK_EQUAL(ftruncate(g.fd, (off_t)bytes), 0);
    g.base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, g.fd, 0);
    CHECK(g.base != MAP_FAILED);
    return g;
}

static inline void guest_end(struct guest *g)
{
    munmap(g->base, g->bytes);
    close(g->fd);
}

/* Room in the guest's memory; an offset. */
static inline uint64_t guest_take(struct guest *g, uint64_t bytes, uint64_t align)
{
    uint64_t at = (g->taken + align - 1) & ~(align - 1);
    CHECK(at + bytes <= g->bytes);
    g->taken = at + bytes;
    return at;
}

/* The region for [at, at + bytes) of the memory, with a descriptor to be given away. */
static inline struct vs_region guest_region(const struct guest *g, uint64_t at, uint64_t bytes)
{
    return (struct vs_region){.guest_addr = GUEST_ADDR + at,
                              .bytes = bytes,
                              .user_addr = USER_ADDR + at,
                              .mmap_offset = at,
                              .fd = dup(g->fd)};
}

struct ring {
    struct guest *guest;
    unsigned num;
    uint64_t desc_at, avail_at, used_at; /* offsets in the guest's memory */
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    uint16_t published, reaped; /* free-running */
};

static inline struct ring ring_make(struct guest *g, unsigned num)
{
    struct ring r = {.guest = g, .num = num};
    r.desc_at = guest_take(g, 16u * num, 4096);
    r.avail_at = guest_take(g, 6 + 2u * num, 4096);
    r.used_at = guest_take(g, 6 + 8u * num, 4096);
    r.desc = (struct vring_desc *)(void *)(g->base + r.desc_at);
    r.avail = (struct vring_avail *)(void *)(g->base + r.avail_at);
    r.used = (struct vring_used *)(void *)(g->base + r.used_at);
    return r;
}

static inline void ring_desc(struct vring_desc *d, uint64_t addr, uint32_t len, unsigned flags, unsigned next)
{
    *d = (struct vring_desc){.addr = addr, .len = len, .flags = (uint16_t)flags, .next = (uint16_t)next};
}

/* A head for the device, which sees it after ring_publish(). */
static inline void ring_put(struct ring *r, unsigned head)
{
    r->avail->ring[r->published++ % r->num] = (uint16_t)head;
}

static inline void ring_publish(struct ring *r)
{
    __atomic_store_n(&r->avail->idx, r->published, __ATOMIC_RELEASE);
    atomic_thread_fence(memory_order_seq_cst);
}

static inline bool ring_reap(struct ring *r, struct vring_used_elem *out)
{
    if (__atomic_load_n(&r->used->idx, __ATOMIC_ACQUIRE) == r->reaped)
        return false;
    *out = r->used->ring[r->reaped++ % r->num];
    return true;
}

static inline uint16_t *ring_used_event(struct ring *r)
{
    return &r->avail->ring[r->num];
}

static inline uint16_t *ring_avail_event(struct ring *r)
{
    return (uint16_t *)(void *)&r->used->ring[r->num];
}

#endif
