/* SPDX-License-Identifier: Apache-2.0
 *
 * The bulk copy while the guest runs. See copier.c for why no region has to be
 * copied twice.
 */
#ifndef VS_COPIER_H
#define VS_COPIER_H

#include "region_copy.h"

int copier_init(struct copier *k, const struct copier_rooms *rooms, unsigned depth);
void copier_free(struct copier *k);
/* All regions that may differ are to be copied. */
void copier_start(struct copier *k);
/* In steady: this range is to be copied, too (grow.c), until uncopied.growing is taken back. */
void copier_add(struct copier *k, uint64_t offset, uint64_t length, struct copy_of_growth *growth);
/* 0: no limit. */
void copier_set_speed(struct copier *k, uint64_t bytes_per_s);
void copier_pump(struct copier *k);
/* The destination is given up. */
void copier_drop(struct copier *k);
uint64_t copier_deadline_ns(const struct copier *k);

#endif
