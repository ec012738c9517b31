/* SPDX-License-Identifier: Apache-2.0
 *
 * Guest reads that the source could not do, answered from the destination
 * where it is known to hold the same. See read_fallback.c.
 */
#ifndef VS_READ_FALLBACK_H
#define VS_READ_FALLBACK_H

#include <stdbool.h>
#include <stdint.h>

#include "destination.h"
#include "limits.h"
#include "list.h"
#include "ring_alloc.h"

struct guest;
struct request;
struct queue;

/* A read of the destination. It may outlive its request, which does not wait for a destination that hangs. */
struct fallback_read {
    struct guest *guest;
    struct request *request; /* NULL: free, or its request is answered */
    bool in_use;
    int64_t slot;
    uint8_t *buffer;
    struct iovec iov;
    struct destination_io io;
};

struct read_fallback {
    struct list waiting; /* requests, until the destination holds what they may see */
    struct ring_alloc buffers;
    struct fallback_read reads[FALLBACK_DEPTH];
    unsigned in_use;
    uint64_t answered;   /* reads, so far */
    uint64_t told_epoch; /* of the mirror: that it happens was told */
};

int read_fallback_init(struct guest *g);
void read_fallback_free(struct guest *g);
/* A read that the source has failed; true: it is answered from here on. */
bool read_fallback_take(struct request *r, int error);
void read_fallback_pump(struct guest *g);
/* The mirror is not steady any more, and somebody has not been told. */
bool read_fallback_due(const struct guest *g);
uint64_t read_fallback_deadline_ns(const struct guest *g);
/* Whether a request of this queue waits for the destination. */
bool read_fallback_waits(const struct guest *g, const struct queue *q);

#endif
