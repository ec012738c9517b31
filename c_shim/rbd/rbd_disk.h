/* SPDX-License-Identifier: Apache-2.0
 *
 * An image that is open and locked becomes a disk of the engine.
 */
#ifndef VS_RBD_DISK_H
#define VS_RBD_DISK_H

#include <rbd/librbd.h>

#include "disk_services.h"
#include "shim.h"

/* First of all: the core's side of the door. 0, or -EINVAL: the core was built from other headers. */
int vs_rbd_begin(const struct vs_disk_services *services);

/* A disk that owns the three of them, and closes them in this order. NULL: errno says why; then they stay the
 * caller's. close_timeout_s bounds each of the calls that closing makes. */
vs_disk *vs_rbd_disk(rbd_image_t image, rados_ioctx_t pool, rados_t cluster, uint64_t bytes, uint32_t close_timeout_s);

/* Whether the client of this number still has an image that was given to vs_rbd_disk, in this process. */
int vs_rbd_has_client(uint64_t client);

#endif
