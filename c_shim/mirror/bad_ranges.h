/* SPDX-License-Identifier: Apache-2.0
 *
 * Ranges of the source that are not to be trusted (durability, rule 5), and what follows from it for the destination.
 * See bad_ranges.c.
 */
#ifndef VS_BAD_RANGES_H
#define VS_BAD_RANGES_H

#include <stdbool.h>
#include <stdint.h>

#include "range_set.h"

struct bad_ranges {
    struct range_set doubt;  /* a write of the source failed there */
    struct range_set spared; /* of these: what the destination holds better, so that no copy brings it there */
    struct range_set soon;   /* spared once the destination holds durably all up to generation "soon_at" */
    uint64_t soon_at;
    struct range_set unreadable; /* the copy could not read the source there, so the destination lacks it */
    uint64_t healed_at;          /* generation of the last write that has taken something off "unreadable" */
};

/* As an earlier run has left them: rule 5 knows no restart. */
void bad_ranges_load(struct bad_ranges *b, const struct vs_engine_config *config);

/* mirrored: it failed in steady, and was captured. */
void bad_ranges_write_failed(struct bad_ranges *b, uint64_t offset, uint64_t length, bool mirrored,
                             const struct vs_counts *counts);
/* A write has covered this range. */
void bad_ranges_written(struct bad_ranges *b, uint64_t offset, uint64_t length, uint64_t generation);
void bad_ranges_not_read(struct bad_ranges *b, uint64_t offset, uint64_t length);
/* All that differs is to be copied: what cannot be read will be found again. */
void bad_ranges_copy_begins(struct bad_ranges *b);

bool bad_ranges_any(const struct bad_ranges *b);
/* Something of it is in doubt or unreadable. */
bool bad_ranges_overlap(const struct bad_ranges *b, uint64_t offset, uint64_t length);
/* Where the source was unreadable, the destination may lack what the guest has flushed. The write that healed it is
 * durable there: else a power cut would bring back what it had before. */
bool bad_ranges_healed(const struct bad_ranges *b, const struct vs_counts *counts);

/* What is to be spared, and whether the destination holds so much by now. */
void bad_ranges_pump(struct bad_ranges *b, const struct vs_counts *counts);
/* The counts are about to become unknown. */
void bad_ranges_leave_steady(struct bad_ranges *b, const struct vs_counts *counts);
/* Another destination, or one that is to get everything. */
void bad_ranges_spare_none(struct bad_ranges *b);
/* Another disk is the source. */
void bad_ranges_forget(struct bad_ranges *b);

#endif
