/* SPDX-License-Identifier: Apache-2.0
 *
 * What can be read of a region whose read has failed. See copy_rescue.c.
 */
#ifndef VS_COPY_RESCUE_H
#define VS_COPY_RESCUE_H

#include "region_copy.h"

/* Ends in copy_put_in_turn() with "bad" filled in, or in copy_end(). */
void rescue_start(struct region_copy *c);

#endif
