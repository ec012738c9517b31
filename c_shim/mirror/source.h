/* SPDX-License-Identifier: Apache-2.0
 *
 * The disk that the guest has.
 */
#ifndef VS_SOURCE_H
#define VS_SOURCE_H

#include <stdint.h>

#include "disk.h"
#include "range_slots.h"

struct source {
    vs_disk *disk;
    struct range_slots slots; /* turns of what overlaps on its way there */
    uint64_t capacity_bytes;  /* what the guest sees of it */
    uint32_t block_bytes;     /* the guest's logical block */
};

#endif
