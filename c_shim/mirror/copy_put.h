/* SPDX-License-Identifier: Apache-2.0
 *
 * How a region that was read comes to the destination. See copy_put.c.
 */
#ifndef VS_COPY_PUT_H
#define VS_COPY_PUT_H

#include "region_copy.h"

void copy_put_init(struct region_copy *c);
/* Its bytes are there, but for those in "bad": it is put once its turn has come. */
void copy_put_in_turn(struct region_copy *c);
/* Those whose turn has come. */
void copy_put_granted(struct copier *k);

#endif
