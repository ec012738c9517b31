/* SPDX-License-Identifier: Apache-2.0
 *
 * The door to the core for a kind of disk that is no part of it.
 *
 * Such a kind is a library of its own, so a host that does not use it needs neither the library nor what it is linked
 * with. The control plane loads the library and hands it this table; the library makes a vs_disk, which the control
 * plane gives to the engine as it does with a file's. The library is built with disk.h, but calls the core through this
 * table alone, because the core exports no symbols.
 */
#ifndef VS_DISK_SERVICES_H
#define VS_DISK_SERVICES_H

#include "disk.h"

struct vs_disk_services {
    uint32_t services_bytes, disk_bytes, io_bytes, host_bytes; /* sizeof, as the core was built */
    void (*init)(struct vs_disk *disk, const struct disk_ops *ops, uint64_t bytes, uint32_t block_bytes,
                 uint32_t memory_align_bytes, uint32_t can);
    void (*complete)(struct disk_io *io, int result);
    void (*complete_remote)(struct disk_io *io, int result);
    void (*complete_remote_all)(struct disk_host *host, struct list *ios);
    void (*thread_begin)(const char *name); /* first thing on a thread of the library's own */
    void (*progress)(struct disk_io *io);
    void (*all_data)(struct disk_io *io);
    bool (*iov_aligned)(const struct vs_disk *disk, const struct iovec *iov, int count);
    void (*io_advance)(struct disk_io *io, uint64_t bytes);
};

/* The core was built with the same disk.h as the caller. */
static inline bool disk_services_fit(const struct vs_disk_services *s)
{
    return s->services_bytes == sizeof *s && s->disk_bytes == sizeof(struct vs_disk) &&
           s->io_bytes == sizeof(struct disk_io) && s->host_bytes == sizeof(struct disk_host);
}

#endif
