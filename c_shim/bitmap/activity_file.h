/* SPDX-License-Identifier: Apache-2.0
 *
 * The activity log as it lies in the bitmap's file: two copies, of which the
 * newest whole one counts. See activity_log.c.
 */
#ifndef VS_ACTIVITY_FILE_H
#define VS_ACTIVITY_FILE_H

#include <stdint.h>

#include "bitmap_layout.h"

struct activity_head {
    uint64_t checksum; /* the exclusive or of bitmap_mix() of all that follows, by place */
    uint64_t magic;
    uint64_t sequence;
    uint64_t count;
    uint64_t extent[];
};

struct activity_list {
    uint32_t count;
    uint64_t *extent; /* the caller frees it */
};

/* Bytes of one copy. */
uint64_t activity_log_bytes(uint32_t extents);
/* What the newest whole copy says (0), -EUCLEAN: none is whole; or another negative errno. Sets bitmap's sequence. */
int activity_log_read(int fd, struct vs_bitmap *bitmap, struct activity_list *out);
/* The sequence alone: what it says does not matter. */
int activity_log_sequence(int fd, struct vs_bitmap *bitmap);
/* Both copies empty. */
int activity_log_clear(int fd, struct vs_bitmap *bitmap);
/* A copy that holds its count and its extents becomes whole. */
void activity_compose(struct activity_head *head, uint64_t sequence);

#endif
