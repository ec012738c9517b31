/* SPDX-License-Identifier: Apache-2.0
 *
 * The dirty bitmap in a file: the difference map as it outlives this process,
 * and, with the activity log (activity_log.h), this machine. See bitmap_file.c.
 */
#ifndef VS_BITMAP_FILE_H
#define VS_BITMAP_FILE_H

#include <stdbool.h>
#include <stdint.h>

#include "bitmap_layout.h"
#include "dirty_map.h"

bool bitmap_fits(const struct vs_bitmap *b, uint64_t capacity_bytes, uint32_t region_bytes);
/* The disk has grown, and the file is long enough: the new blocks are put in order. Engine's thread; does not wait for
 * a disk. -EUCLEAN: the file is too short; -EINVAL; -ENOMEM. Nothing has changed then. */
int bitmap_grow(struct vs_bitmap *b, uint64_t capacity_bytes);
/* What vs_bitmap_open() found is put into "into". */
void bitmap_load(const struct vs_bitmap *b, struct dirty_map *into);
/* dirty_map.stored: the file follows the map word by word. */
void bitmap_store(void *bitmap, uint64_t word, uint64_t value);
/* The file behind the mapping was cut short; what is stored goes nowhere. */
bool bitmap_lost(const struct vs_bitmap *b);

#endif
