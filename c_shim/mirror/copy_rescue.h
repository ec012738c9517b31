/* SPDX-License-Identifier: Apache-2.0
 *
 * What can be read of a region whose read has failed. See copy_rescue.c.
 */
#ifndef VS_COPY_RESCUE_H
#define VS_COPY_RESCUE_H

#include "copier.h"

/* Ends in copier_was_read() with "bad" filled in, or in copier_end(). */
void rescue_start(struct region_copy *c);

#endif
