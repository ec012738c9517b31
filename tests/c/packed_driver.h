/* SPDX-License-Identifier: Apache-2.0
 *
 * A driver's side of a packed virtqueue (virtio 1.x, 2.8). See ring.h for the
 * guest's memory.
 */
#ifndef VS_TEST_PACKED_DRIVER_H
#define VS_TEST_PACKED_DRIVER_H

#include "ring.h"

#define PACKED_AVAIL (1u << VRING_PACKED_DESC_F_AVAIL)
#define PACKED_USED (1u << VRING_PACKED_DESC_F_USED)
#define WRAP 0x8000u

struct packed_driver {
    struct guest *guest;
    unsigned num;
    uint64_t desc_at, driver_at, device_at; /* offsets in the guest's memory */
    struct vring_packed_desc *desc;
    struct vring_packed_desc_event *driver, *device;
    uint16_t avail, used; /* places: an index, with the wrap counter in bit 15 */
    unsigned hidden;      /* the head that packed_put() has not shown yet; num: none */
    uint16_t hidden_flags;
    uint16_t count[VS_MAX_QUEUE_SIZE]; /* descriptors by buffer ID */
};

static inline uint16_t packed_step(unsigned num, uint16_t place, unsigned steps)
{
    unsigned index = (place & (WRAP - 1)) + steps;
    uint16_t wrap = place & WRAP;
    return (uint16_t)(index < num ? wrap | index : (wrap ^ WRAP) | (index - num));
}

static inline struct packed_driver packed_make(struct guest *g, unsigned num, uint16_t at)
{
    struct packed_driver r = {.guest = g, .num = num, .avail = at, .used = at, .hidden = num};
    r.desc_at = guest_take(g, 16u * num, 4096);
    r.driver_at = guest_take(g, 4, 4);
    r.device_at = guest_take(g, 4, 64);
    r.desc = (struct vring_packed_desc *)(void *)(g->base + r.desc_at);
    r.driver = (struct vring_packed_desc_event *)(void *)(g->base + r.driver_at);
    r.device = (struct vring_packed_desc_event *)(void *)(g->base + r.device_at);
    for (unsigned i = 0; i < num; i++) /* as if they had been used: up to here in this round, the others in the last */
        r.desc[i].flags = !(at & WRAP) == !(i < (at & (WRAP - 1))) ? PACKED_AVAIL | PACKED_USED : 0;
    return r;
}

static inline uint16_t packed_available(uint16_t place)
{
    return place & WRAP ? PACKED_AVAIL : PACKED_USED;
}

/* A chain, whose flags are what it says of itself; all but the first head that was not shown yet lies open. */
static inline void packed_put(struct packed_driver *r, const struct vring_packed_desc *chain, unsigned count,
                              unsigned id)
{
    for (unsigned i = 0; i < count; i++) {
        unsigned at = r->avail & (WRAP - 1);
        uint16_t flags =
            (uint16_t)(chain[i].flags | packed_available(r->avail) | (i + 1 < count ? VRING_DESC_F_NEXT : 0));
        r->desc[at].addr = chain[i].addr;
        r->desc[at].len = chain[i].len;
        r->desc[at].id = (uint16_t)(i + 1 < count ? 0xeeee : id);
        if (i == 0 && r->hidden == r->num) {
            r->hidden = at;
            r->hidden_flags = flags;
        } else {
            r->desc[at].flags = flags;
        }
        r->avail = packed_step(r->num, r->avail, 1);
    }
    if (id < VS_MAX_QUEUE_SIZE)
        r->count[id] = (uint16_t)count;
}

static inline void packed_publish(struct packed_driver *r)
{
    if (r->hidden < r->num)
        __atomic_store_n(&r->desc[r->hidden].flags, r->hidden_flags, __ATOMIC_RELEASE);
    r->hidden = r->num;
    atomic_thread_fence(memory_order_seq_cst);
}

static inline bool packed_reap(struct packed_driver *r, unsigned *id, uint32_t *written)
{
    const struct vring_packed_desc *d = &r->desc[r->used & (WRAP - 1)];
    uint16_t want = r->used & WRAP ? PACKED_AVAIL | PACKED_USED : 0;
    if ((__atomic_load_n(&d->flags, __ATOMIC_ACQUIRE) & (PACKED_AVAIL | PACKED_USED)) != want)
        return false;
    *id = d->id;
    *written = d->len;
    r->used = packed_step(r->num, r->used, *id < VS_MAX_QUEUE_SIZE ? r->count[*id] : 1);
    return true;
}

#endif
