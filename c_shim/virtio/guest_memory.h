/* SPDX-License-Identifier: Apache-2.0
 *
 * A guest's memory as its frontend shares it. A table is immutable: every
 * change makes a new one, and a request pins the table that it was translated
 * with, so a region is unmapped when the last request that may use it is over.
 */
#ifndef VS_GUEST_MEMORY_H
#define VS_GUEST_MEMORY_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "bounds.h"
#include "list.h"

struct mem_region {
    uint64_t guest_addr;
    uint64_t bytes;
    uint64_t user_addr;
    uint8_t *host; /* where guest_addr is mapped here */
    void *map;     /* what mmap gave: a page boundary at or before host */
    uint64_t map_bytes;
    unsigned tables; /* how many tables hold it */
    int sigbus_slot;
    uint64_t gone_token; /* a REMOVE_MEM_REGION command that waits for the unmapping; 0: none */
};

struct mem_table {
    unsigned pins; /* requests in flight, and one for being current */
    unsigned count;
    struct mem_region *region[VS_MAX_MEM_SLOTS]; /* by guest_addr */
};

struct guest_memory {
    struct mem_table *current; /* never NULL after init */
    unsigned regions;          /* mapped, in any table */
    /* Told when a region that a command waits for is unmapped. */
    void (*gone)(struct guest_memory *memory, uint64_t token);
};

int guest_memory_init(struct guest_memory *m, void (*gone)(struct guest_memory *, uint64_t));
/* No request is in flight any more. */
void guest_memory_free(struct guest_memory *m);

/* All three close the descriptors. 0 or a negative errno: EINVAL for a range
 * that is empty, wraps or is not in the file, EEXIST for one that overlaps,
 * ENOSPC for too many, ENOENT for one that is not there. On failure the table stays. */
int guest_memory_set(struct guest_memory *m, const struct vs_region *regions, unsigned count);
int guest_memory_add(struct guest_memory *m, const struct vs_region *region);
/* The region is gone when gone(token) says so, which may be within the call. */
int guest_memory_remove(struct guest_memory *m, const struct vs_region *region, uint64_t token);

struct mem_table *mem_table_pin(struct guest_memory *m);
void mem_table_unpin(struct guest_memory *m, struct mem_table *t);

/* Where [addr, addr + bytes) of guest memory is mapped, if it lies in one
 * region; NULL otherwise. bytes > 0. */
void *guest_at(const struct mem_table *t, uint64_t addr, uint64_t bytes);
/* The guest address of what lies mapped in the table. */
uint64_t guest_addr_of(const struct mem_table *t, const void *host);
/* The same for a frontend's user address. */
void *guest_at_user(const struct mem_table *t, uint64_t user_addr, uint64_t bytes);
/* The same as segments, at most "max" (a range may cross from a region into the
 * next): how many, or 0 if any of it lies outside the table, or -1 if max do not do. */
int guest_iov(const struct mem_table *t, uint64_t addr, uint64_t bytes, struct iovec *iov, int max);

/* A frontend may shrink the file behind its memory; touching that raises SIGBUS.
 * The handler puts zero pages there and marks the region, so that the access
 * goes on and the engine ends the attachment. Once per process. */
void guest_memory_catch_sigbus(void);
bool guest_memory_lost(const struct guest_memory *m);
/* The same care for another mapping of a frontend's memory: a number for the two calls below. */
int guest_memory_watch(void *start, uint64_t bytes);
void guest_memory_unwatch(int number);
bool guest_memory_watched_lost(int number);

#endif
