/* SPDX-License-Identifier: Apache-2.0
 *
 * A virtio-blk request, parsed and checked (virtio 1.x, 5.2.6). No I/O, no
 * state: from a chain of descriptors to what is asked for.
 */
#ifndef VS_BLK_REQUEST_H
#define VS_BLK_REQUEST_H

#include <stdint.h>
#include <sys/uio.h>

#include "bounds.h"
#include "virtqueue.h"

struct blk_limits {
    uint64_t capacity_bytes;
    uint32_t block_bytes;
    bool read_only;
};

struct blk_request {
    uint32_t op;                       /* enum vs_request_op */
    bool may_unmap;                    /* discard, and write-zeroes with the unmap flag */
    uint8_t *status;                   /* the byte that the guest reads the outcome from */
    uint64_t offset;                   /* bytes; within the capacity and aligned to the block */
    uint64_t length;                   /* bytes of data, or of the range to zero */
    uint32_t writable_bytes;           /* what the device may write: data and status */
    struct iovec iov[REQUEST_IOV_MAX]; /* data, in guest memory */
    int iov_count;
};

enum blk_verdict {
    BLK_OK,    /* take it up */
    BLK_IOERR, /* answer VIRTIO_BLK_S_IOERR: malformed or out of range */
    BLK_UNSUPP /* answer VIRTIO_BLK_S_UNSUPP */
};

/* An enum blk_verdict, with a status byte set, or minus an enum vs_breach:
 * then there is nowhere to answer to. */
int blk_request_parse(struct blk_request *r, const struct virtqueue *vq, const struct mem_table *table, uint16_t head,
                      const struct blk_limits *limits);

#endif
