/* SPDX-License-Identifier: Apache-2.0
 *
 * Ranges in doubt: a source write failed there, so what the source holds is
 * unknown (durability, rule 5). A few exact ranges; when there are too many,
 * the two that lie nearest become one, which errs on the side of doubt.
 */
#ifndef VS_DOUBT_H
#define VS_DOUBT_H

#include <stdbool.h>
#include <stdint.h>

#include "shim.h"

struct doubt {
    uint32_t count;
    struct vs_doubt_range range[VS_DOUBT_RANGES_MAX]; /* ascending, apart from each other */
};

void doubt_add(struct doubt *d, uint64_t offset, uint64_t length);
/* A write has covered this range. */
void doubt_clear(struct doubt *d, uint64_t offset, uint64_t length);
bool doubt_overlaps(const struct doubt *d, uint64_t offset, uint64_t length);

#endif
