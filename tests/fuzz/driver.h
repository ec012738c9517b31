/* SPDX-License-Identifier: Apache-2.0
 *
 * A driver that lays out mostly valid virtio-blk requests, each field of them a
 * knob that the input may turn.
 */
#ifndef VS_FUZZ_DRIVER_H
#define VS_FUZZ_DRIVER_H

#include "../c/packed_driver.h"
#include "choices.h"

struct driver {
    struct guest *guest;
    uint64_t desc_at; /* the ring's descriptors, in the guest's memory */
    unsigned num;
    struct ring *ring; /* one of these two */
    struct packed_driver *packed;
    struct choices *choices;
    uint64_t header_at, header_room; /* headers, status bytes, segments of discard: in guest memory */
    uint64_t table_at, table_room;   /* indirect tables */
    uint64_t data_at, data_room;
    uint64_t capacity_bytes;
    bool indirect;
    unsigned next_desc;
    uint64_t header_used, table_used;
};

/* Which ring it drives: driver_use_ring(), driver_use_packed(). */
static inline struct driver driver_make(struct guest *guest, struct choices *choices, uint64_t data_at,
                                        uint64_t capacity_bytes, bool indirect)
{
    return (struct driver){.guest = guest,
                           .choices = choices,
                           .header_at = 0x8000,
                           .header_room = 0x4000,
                           .table_at = 0xc000,
                           .table_room = 0x4000,
                           .data_at = data_at,
                           .data_room = 0x10000,
                           .capacity_bytes = capacity_bytes,
                           .indirect = indirect};
}

static inline void driver_use_ring(struct driver *d, struct ring *ring)
{
    d->ring = ring;
    d->packed = NULL;
    d->desc_at = ring->desc_at;
    d->num = ring->num;
}

static inline void driver_use_packed(struct driver *d, struct packed_driver *ring)
{
    d->packed = ring;
    d->ring = NULL;
    d->desc_at = ring->desc_at;
    d->num = ring->num;
}

struct driver_segment {
    uint64_t addr; /* guest address */
    uint32_t len;
    bool device_writes;
};

#define DRIVER_SEGMENTS 24

static inline uint64_t driver_room(uint64_t at, uint64_t room, uint64_t *used, uint64_t bytes)
{
    if (*used + bytes > room)
        *used = 0; /* writes over what came before: one more way to be unkind */
    *used += bytes;
    return at + *used - bytes;
}

/* Cuts a range into up to 3 pieces at a time (any layout is legal). */
static inline unsigned driver_cut(struct driver *d, struct driver_segment *s, unsigned count, uint64_t addr,
                                  uint32_t len, bool device_writes)
{
    unsigned pieces = choose(d->choices, 8) == 7 ? 3 : 1;
    while (pieces-- > 0 && count < DRIVER_SEGMENTS) {
        uint32_t here = pieces && len ? choose(d->choices, 1024) % len : len;
        s[count++] = (struct driver_segment){addr, here, device_writes};
        addr += here;
        len -= here;
    }
    return count;
}

static inline void driver_desc(struct driver *d, struct vring_desc *to, const struct driver_segment *s, bool last,
                               unsigned next)
{
    unsigned flags = (s->device_writes ? VRING_DESC_F_WRITE : 0u) | (last ? 0u : VRING_DESC_F_NEXT);
    ring_desc(to, mostly(d->choices, s->addr), (uint32_t)mostly(d->choices, s->len),
              (unsigned)mostly(d->choices, flags), (unsigned)mostly(d->choices, last ? 0 : next));
}

/* A list of packed descriptors, in the ring or in a table. What the driver does not do by itself: count[] may be a
 * lie. */
static inline void driver_put_packed(struct driver *d, const struct driver_segment *s, unsigned count)
{
    struct packed_driver *ring = d->packed;
    struct vring_packed_desc list[DRIVER_SEGMENTS], head;
    unsigned id = (unsigned)mostly(d->choices, d->next_desc % ring->num);
    for (unsigned i = 0; i < count; i++)
        list[i] = (struct vring_packed_desc){
            .addr = mostly(d->choices, s[i].addr),
            .len = (uint32_t)mostly(d->choices, s[i].len),
            .flags = (uint16_t)mostly(d->choices, s[i].device_writes ? VRING_DESC_F_WRITE : 0)};
    d->next_desc++;
    if (d->indirect && choose(d->choices, 4) != 3) {
        uint64_t at = driver_room(d->table_at, d->table_room, &d->table_used, 16ull * count);
        memcpy(d->guest->base + at, list, 16ull * count);
        head = (struct vring_packed_desc){.addr = mostly(d->choices, GUEST_ADDR + at),
                                          .len = (uint32_t)mostly(d->choices, 16ull * count),
                                          .flags = (uint16_t)mostly(d->choices, VRING_DESC_F_INDIRECT)};
        packed_put(ring, &head, 1, id & 0xffff);
    } else if (count <= ring->num) {
        packed_put(ring, list, count, id & 0xffff);
    }
}

static inline void driver_put_chain(struct driver *d, const struct driver_segment *s, unsigned count)
{
    struct ring *ring = d->ring;
    uint8_t *memory = d->guest->base;
    if (d->packed) {
        driver_put_packed(d, s, count);
        return;
    }
    unsigned head = d->next_desc % ring->num;
    if (d->indirect && choose(d->choices, 4) != 3) {
        uint64_t at = driver_room(d->table_at, d->table_room, &d->table_used, 16ull * count);
        for (unsigned i = 0; i < count; i++) {
            struct vring_desc one;
            driver_desc(d, &one, &s[i], i + 1 == count, i + 1);
            memcpy(memory + at + 16ull * i, &one, sizeof one);
        }
        ring_desc(&ring->desc[head], mostly(d->choices, GUEST_ADDR + at), (uint32_t)mostly(d->choices, 16ull * count),
                  (unsigned)mostly(d->choices, VRING_DESC_F_INDIRECT), 0);
        d->next_desc++;
    } else {
        for (unsigned i = 0; i < count; i++, d->next_desc++)
            driver_desc(d, &ring->desc[d->next_desc % ring->num], &s[i], i + 1 == count,
                        (d->next_desc + 1) % ring->num);
    }
    ring_put(ring, (unsigned)mostly(d->choices, head));
}

static inline void driver_put_request(struct driver *d)
{
    static const uint32_t types[] = {
        VIRTIO_BLK_T_OUT,          VIRTIO_BLK_T_IN,      VIRTIO_BLK_T_FLUSH,  VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN};
    struct choices *c = d->choices;
    struct driver_segment s[DRIVER_SEGMENTS];
    uint8_t *memory = d->guest->base;
    uint32_t type = types[choose(c, 8)], bytes = 512u * (1 + choose(c, 32)), left;
    bool reads = type == VIRTIO_BLK_T_IN || type == VIRTIO_BLK_T_GET_ID;
    uint64_t at = driver_room(d->header_at, d->header_room, &d->header_used, 64);
    uint64_t sector = choose(c, 2048) % (d->capacity_bytes / 512);
    unsigned count;
    struct virtio_blk_outhdr header = {.type = (uint32_t)mostly(c, type), .sector = mostly(c, sector)};
    memcpy(memory + at, &header, sizeof header);
    count = driver_cut(d, s, 0, GUEST_ADDR + at, sizeof header, false);
    if (type == VIRTIO_BLK_T_DISCARD || type == VIRTIO_BLK_T_WRITE_ZEROES) {
        struct virtio_blk_discard_write_zeroes range = {.sector = mostly(c, sector),
                                                        .num_sectors = (uint32_t)mostly(c, bytes / 512),
                                                        .flags = (uint32_t)mostly(c, 0)};
        memcpy(memory + at + 16, &range, sizeof range);
        count = driver_cut(d, s, count, GUEST_ADDR + at + 16, sizeof range, false);
    } else if (type != VIRTIO_BLK_T_FLUSH) {
        left = type == VIRTIO_BLK_T_GET_ID ? 20 : bytes;
        count = driver_cut(d, s, count, GUEST_ADDR + d->data_at + choose(c, 512) % (d->data_room - left), left, reads);
    }
    count = driver_cut(d, s, count, GUEST_ADDR + at + 48, 1, true);
    driver_put_chain(d, s, count);
}

/* What a hostile guest does beside: any few bytes of its memory, at any time. */
static inline void driver_poke(struct driver *d)
{
    struct choices *c = d->choices;
    if (!rarely(c))
        return;
    uint64_t at = choose_raw(c, 3) % (d->guest->bytes - 8);
    uint64_t value = choose_raw(c, 4);
    if (choose(c, 2)) /* where it hurts most */
        at = d->desc_at + at % (16u * d->num);
    memcpy(d->guest->base + at, &value, 1 + choose(c, 8));
}

#endif
