/* SPDX-License-Identifier: Apache-2.0
 *
 * A driver's side of a virtqueue, split (virtio 1.x 2.7) or packed (2.8). One
 * thread's; no call into the kernel. Little-endian hosts only.
 */
#ifndef BENCH_RING_H
#define BENCH_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };

/* Of either layout, for their size; the last two fields mean something else in each. */
struct descriptor {
    uint64_t address;
    uint32_t bytes;
    uint16_t last[2]; /* split: flags, next; packed: id, flags */
};

struct avail_ring {
    uint16_t flags;
    uint16_t index;
    uint16_t ring[]; /* then used_event */
};

struct used_element {
    uint32_t id;
    uint32_t bytes;
};

struct used_ring {
    uint16_t flags;
    uint16_t index;
    struct used_element ring[]; /* then avail_event */
};

/* Of a packed ring, in the places of the avail and the used ring. */
struct suppression {
    uint16_t place; /* an index, and in bit 15 the wrap counter there */
    uint16_t flags;
};

struct segment {
    uint64_t address;
    uint32_t bytes;
    bool device_writes;
};

struct ring {
    bool packed, event_idx;
    uint32_t size;
    uint32_t stride; /* descriptors that a request takes at most */
    struct descriptor *descriptors;
    union {
        struct avail_ring *avail;
        struct suppression *driver;
    };
    union {
        struct used_ring *used;
        struct suppression *device;
    };
    int kick_fd;
    int call_fd;
    uint16_t next;      /* free-running (split), or a place (packed): where the next request goes */
    uint16_t published; /* the same, as the device knows it */
    uint16_t used_next; /* where the next answer is */
    uint16_t used_known;
    uint16_t hidden_flags; /* of the descriptor at "published", which shows all from there on */
    uint16_t *list_length; /* packed: by request */
};

/* The memory at "descriptors", "avail" and "used" is zero. Calls are not asked for. */
void ring_begin(struct ring *ring, bool packed, bool event_idx, uint32_t size);
/* What SET_VRING_BASE and GET_VRING_BASE say of it. */
uint32_t ring_base(const struct ring *ring);

/* Request "number" (below size / stride), as a table at "table" (guest address "table_at") or, NULL, in the ring. */
void ring_put(struct ring *ring, uint32_t number, const struct segment *segments, uint32_t count, void *table,
              uint64_t table_at);
/* Shows what was put; true: the device wants to be notified. */
bool ring_publish(struct ring *ring);

bool ring_something_used(const struct ring *ring);
/* Of those that are there when the first is taken: the next answered request's number; false: no more. */
bool ring_next_used(struct ring *ring, uint32_t *number);

/* Asks for a call at the next answer (look again after that). */
void ring_ask_for_call(struct ring *ring);
void ring_no_calls(struct ring *ring);

#endif
