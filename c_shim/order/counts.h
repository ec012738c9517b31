/* SPDX-License-Identifier: Apache-2.0
 *
 * The counts and the count check (docs/durability.md). Pure: no I/O, no time,
 * no other state. All other code changes the counts only through these.
 *
 * Invariants, asserted after each change:
 *     writes_flushed <= writes_mirrored <= source_generation
 *     source_flushed <= source_generation, flush_request <= source_generation
 * and none goes down while a destination is attached.
 */
#ifndef VS_COUNTS_H
#define VS_COUNTS_H

#include <stdbool.h>
#include <stdint.h>

#include "shim.h"

/* A guest write (discard, write-zeroes) has completed on the source: its generation. */
uint64_t counts_write_completed(struct vs_counts *c);
/* The destination holds every write 1 .. prefix (in steady). */
void counts_mirrored(struct vs_counts *c, uint64_t prefix);
/* A guest flush was popped: its flush_request, G as of now. */
uint64_t counts_flush_requested(struct vs_counts *c);
/* A flush has succeeded that began when G (M) was this. */
void counts_source_flushed(struct vs_counts *c, uint64_t generation_at_begin);
void counts_destination_flushed(struct vs_counts *c, uint64_t mirrored_at_begin);
/* Steady: a destination flush succeeded that began when all up to "prefix" was on it. */
void counts_enter_steady(struct vs_counts *c, uint64_t prefix);
/* The destination is gone: M and F mean nothing. */
void counts_leave_steady(struct vs_counts *c);
/* The disks change roles; M = G. */
void counts_exchange(struct vs_counts *c, bool keep_mirror);

/* Whether the source holds durably all that a flush of this generation covers. */
bool counts_source_holds(const struct vs_counts *c, uint64_t flush_request);

#endif
