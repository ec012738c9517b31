/* SPDX-License-Identifier: Apache-2.0
 *
 * Parses a chain of descriptors into a virtio-blk request and checks every part of it. See blk_request.h.
 */
#include "blk_request.h"

#include <linux/virtio_blk.h>
#include <string.h>

#define SECTOR_BYTES 512u

/* What a walk over the chain gathers. Readable data begins after the header
 * and writable data ends before the status byte, wherever the guest has put the
 * borders of its descriptors (VIRTIO_F_ANY_LAYOUT is part of version 1). */
struct gathered {
    struct virtio_blk_outhdr header;
    uint32_t header_bytes;
    uint64_t readable, writable; /* bytes of data so far; writable with the status byte */
    struct chain_segment last_writable;
    bool bad; /* to be answered with an error; the walk goes on to find the status byte */
};

static void add_data(struct blk_request *r, struct gathered *g, const struct mem_table *table, uint64_t addr,
                     uint32_t len)
{
    int n;
    if (len == 0 || g->bad)
        return;
    n = guest_iov(table, addr, len, &r->iov[r->iov_count], REQUEST_IOV_MAX - r->iov_count);
    if (n <= 0)
        g->bad = true; /* outside the guest's memory, or in too many pieces */
    else
        r->iov_count += n;
}

static void add_readable(struct blk_request *r, struct gathered *g, const struct mem_table *table,
                         struct chain_segment s)
{
    if (g->writable > 0)
        g->bad = true; /* readable after writable: 2.7.4.2 */
    if (g->header_bytes < sizeof g->header && s.len > 0) {
        uint32_t part = (uint32_t)sizeof g->header - g->header_bytes;
        const void *from;
        if (part > s.len)
            part = s.len;
        from = guest_at(table, s.addr, part);
        if (!from)
            g->bad = true;
        else
            memcpy((uint8_t *)&g->header + g->header_bytes, from, part);
        g->header_bytes += part;
        s.addr += part;
        s.len -= part;
    }
    g->readable += s.len;
    add_data(r, g, table, s.addr, s.len);
}

/* Walks the chain to its end. 0 or minus an enum vs_breach. */
static int gather(struct blk_request *r, struct gathered *g, const struct virtqueue *vq, const struct mem_table *table,
                  uint16_t head)
{
    struct chain c;
    struct chain_segment s;
    int rc;
    chain_begin(&c, vq, table, head);
    while ((rc = chain_next(&c, &s)) > 0) {
        if (!s.device_writes) {
            add_readable(r, g, table, s);
        } else if (s.len > 0) {
            g->writable += s.len;
            add_data(r, g, table, s.addr, s.len);
            g->last_writable = s;
        }
    }
    if (rc < 0)
        return rc;
    if (g->last_writable.len == 0)
        return -VS_BREACH_NO_STATUS;
    if (g->readable > VS_REQUEST_BYTES_MAX || g->writable > VS_REQUEST_BYTES_MAX + 1u)
        g->bad = true;
    if (!g->bad) { /* the last byte of the last piece is the status, and no data */
        struct iovec *last = &r->iov[r->iov_count - 1];
        r->status = (uint8_t *)last->iov_base + --last->iov_len;
        if (last->iov_len == 0)
            r->iov_count--;
        r->writable_bytes = (uint32_t)g->writable;
    } else {
        r->status = guest_at(table, g->last_writable.addr + g->last_writable.len - 1, 1);
        if (!r->status)
            return -VS_BREACH_NO_STATUS;
    }
    return 0;
}

static bool range_ok(const struct blk_limits *limits, uint64_t sector, uint64_t bytes)
{
    if (bytes == 0 || sector > limits->capacity_bytes / SECTOR_BYTES)
        return false;
    return bytes <= limits->capacity_bytes - sector * SECTOR_BYTES &&
           (sector * SECTOR_BYTES) % limits->block_bytes == 0 && bytes % limits->block_bytes == 0;
}

static int check_data(struct blk_request *r, const struct blk_limits *limits, uint64_t sector, uint64_t bytes)
{
    if (!range_ok(limits, sector, bytes))
        return BLK_IOERR;
    r->offset = sector * SECTOR_BYTES;
    r->length = bytes;
    return BLK_OK;
}

/* One segment of struct virtio_blk_discard_write_zeroes: max_discard_seg and
 * max_write_zeroes_seg are 1 in the configuration. */
static int check_zero(struct blk_request *r, const struct blk_limits *limits, uint64_t readable, bool discard)
{
    struct virtio_blk_discard_write_zeroes seg;
    uint8_t *to = (uint8_t *)&seg;
    uint32_t allowed = discard ? 0 : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
    if (readable != sizeof seg) /* several segments: as QEMU's devices answer them */
        return readable > sizeof seg && readable % sizeof seg == 0 ? BLK_UNSUPP : BLK_IOERR;
    for (int i = 0; i < r->iov_count && to < (uint8_t *)(&seg + 1); i++) {
        size_t left = (size_t)((uint8_t *)(&seg + 1) - to);
        size_t part = r->iov[i].iov_len < left ? r->iov[i].iov_len : left;
        memcpy(to, r->iov[i].iov_base, part);
        to += part;
    }
    if (seg.flags & ~allowed)
        return BLK_UNSUPP; /* 5.2.6.2: unknown flags, and unmap in a discard */
    if (seg.num_sectors > VS_ZERO_SECTORS_MAX ||
        !range_ok(limits, seg.sector, (uint64_t)seg.num_sectors * SECTOR_BYTES))
        return BLK_IOERR;
    r->offset = seg.sector * SECTOR_BYTES;
    r->length = (uint64_t)seg.num_sectors * SECTOR_BYTES;
    r->may_unmap = discard || (seg.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP);
    return BLK_OK;
}

int blk_request_parse(struct blk_request *r, const struct virtqueue *vq, const struct mem_table *table, uint16_t head,
                      const struct blk_limits *limits)
{
    struct gathered g = {.header_bytes = 0};
    uint64_t in_bytes;
    int rc;
    r->op = VS_OP_OTHER;
    r->may_unmap = false;
    r->offset = r->length = 0;
    r->iov_count = 0;
    r->writable_bytes = 1;
    rc = gather(r, &g, vq, table, head);
    if (rc < 0)
        return rc;
    if (g.bad || g.header_bytes < sizeof g.header)
        return BLK_IOERR;
    in_bytes = g.writable - 1;
    switch (g.header.type) {
    case VIRTIO_BLK_T_IN:
        r->op = VS_OP_READ;
        return g.readable ? BLK_IOERR : check_data(r, limits, g.header.sector, in_bytes);
    case VIRTIO_BLK_T_OUT:
        r->op = VS_OP_WRITE;
        return in_bytes || limits->read_only ? BLK_IOERR : check_data(r, limits, g.header.sector, g.readable);
    case VIRTIO_BLK_T_FLUSH:
        r->op = VS_OP_FLUSH; /* drivers may send data with it; it means nothing */
        return BLK_OK;
    case VIRTIO_BLK_T_GET_ID:
        return g.readable ? BLK_IOERR : BLK_OK;
    case VIRTIO_BLK_T_DISCARD:
        r->op = VS_OP_DISCARD;
        return in_bytes || limits->read_only ? BLK_IOERR : check_zero(r, limits, g.readable, true);
    case VIRTIO_BLK_T_WRITE_ZEROES:
        r->op = VS_OP_WRITE_ZEROES;
        return in_bytes || limits->read_only ? BLK_IOERR : check_zero(r, limits, g.readable, false);
    default:
        return BLK_UNSUPP;
    }
}
