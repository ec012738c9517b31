/* SPDX-License-Identifier: Apache-2.0
 *
 * What the copy has still to bring to the destination. copier.c takes from it; the others ask how much is left.
 */
#ifndef VS_UNCOPIED_H
#define VS_UNCOPIED_H

#include "dirty_map.h"

struct uncopied {
    struct dirty_map regions; /* not begun */
    unsigned in_flight;       /* region copies */
    bool growing;             /* in steady: the range by which the disk grows */
};

static inline bool uncopied_is_empty(const struct uncopied *u)
{
    return u->regions.dirty == 0 && u->in_flight == 0;
}

#endif
