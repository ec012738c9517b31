/* SPDX-License-Identifier: Apache-2.0
 *
 * A few exact ranges of a disk that are not to be trusted: in doubt because a
 * write to the source failed there, or unreadable (durability, rule 5). When
 * there are too many, the two that lie nearest become one, which errs on the
 * side of mistrust. Pure.
 */
#ifndef VS_RANGE_SET_H
#define VS_RANGE_SET_H

#include <stdbool.h>
#include <stdint.h>

#include "shim.h"

struct range_set {
    uint32_t count;
    struct vs_range range[VS_RANGES_MAX]; /* ascending, apart from each other */
};

void range_set_add(struct range_set *s, uint64_t offset, uint64_t length);
/* A write has covered this range. */
void range_set_clear(struct range_set *s, uint64_t offset, uint64_t length);
bool range_set_overlaps(const struct range_set *s, uint64_t offset, uint64_t length);
/* The first part of offset .. end - 1 that is in the set; false: none of it is. */
bool range_set_first(const struct range_set *s, uint64_t offset, uint64_t end, struct vs_range *part);

#endif
