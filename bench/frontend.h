/* SPDX-License-Identifier: Apache-2.0
 *
 * The frontend's half of vhost-user-blk, as far as a load generator needs it: it
 * connects, negotiates, shares a memfd and sets rings up. Those are then driven
 * by whoever includes this (ring.h).
 */
#ifndef BENCH_FRONTEND_H
#define BENCH_FRONTEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ring.h"

enum { QUEUES_MAX = 64, RING_SIZE_MAX = 1024 };

/* Where the backend finds our memory as "guest physical" addresses: not 0, so that a
 * backend that confuses the address spaces fails. */
#define GUEST_BASE 0x40000000ull

enum feature {
    BLK_F_SIZE_MAX = 1,
    BLK_F_SEG_MAX = 2,
    BLK_F_RO = 5,
    BLK_F_BLK_SIZE = 6,
    BLK_F_FLUSH = 9,
    BLK_F_CONFIG_WCE = 11,
    BLK_F_MQ = 12,
    RING_F_INDIRECT = 28,
    RING_F_EVENT_IDX = 29,
    VHOST_USER_F_PROTOCOL_FEATURES = 30,
    VIRTIO_F_VERSION_1 = 32,
    VIRTIO_F_RING_PACKED = 34
};

struct frontend {
    int socket;
    int memory_fd;
    uint8_t *memory;
    size_t memory_bytes;
    uint64_t features; /* as negotiated */
    uint64_t protocol_features;
    uint64_t capacity_bytes;
    uint32_t block_bytes;
    uint32_t segment_bytes_max;
    uint32_t segments_max;
    uint32_t queues_max;
    uint32_t ring_size;
    uint32_t queues;
    struct ring ring[QUEUES_MAX];
};

static inline bool has(const struct frontend *frontend, enum feature feature)
{
    return frontend->features >> feature & 1;
}

static inline uint64_t guest_address(const struct frontend *frontend, const void *host)
{
    return GUEST_BASE + (uint64_t)((const uint8_t *)host - frontend->memory);
}

/* Connects and negotiates all of "wanted" that is offered. Everything here ends the process
 * with a sentence when it fails: there is nothing to measure then. */
void frontend_connect(struct frontend *frontend, const char *path, uint64_t wanted);

/* The bytes that rings take at the beginning of the memory: a multiple of 4096. */
size_t frontend_ring_bytes(uint32_t queues, uint32_t ring_size);

/* Shares "memory_bytes" and starts the rings. */
void frontend_start(struct frontend *frontend, uint32_t queues, uint32_t ring_size, size_t memory_bytes);

/* Stops the rings (the backend drains them) and disconnects. */
void frontend_stop(struct frontend *frontend);

void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

#endif
