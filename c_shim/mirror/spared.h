/* SPDX-License-Identifier: Apache-2.0
 *
 * Which of the ranges in doubt the destination holds better than the source, so
 * that no copy overwrites them there (rule 5). See spared.c.
 */
#ifndef VS_SPARED_H
#define VS_SPARED_H

#include <stdint.h>

#include "range_set.h"

struct vs_engine;

struct spared {
    struct range_set ranges;
    struct range_set soon;    /* once the destination holds durably all up to generation "soon_at" */
    uint64_t soon_at;
};

/* A write that was captured has failed in steady. */
void spared_add(struct vs_engine *e, uint64_t offset, uint64_t length);
/* A write has covered this range. */
void spared_clear(struct vs_engine *e, uint64_t offset, uint64_t length);
void spared_pump(struct vs_engine *e);
/* The counts are about to become unknown. */
void spared_leave_steady(struct vs_engine *e);
/* Another destination, or one that is to get everything. */
void spared_forget(struct vs_engine *e);

#endif
