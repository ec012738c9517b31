/* SPDX-License-Identifier: Apache-2.0
 *
 * Guest reads that the source could not do, answered from the destination
 * where it is known to hold the same. See read_fallback.c.
 */
#ifndef VS_READ_FALLBACK_H
#define VS_READ_FALLBACK_H

#include <stdbool.h>
#include <stdint.h>

struct guest;
struct request;
struct queue;

int read_fallback_init(struct guest *g);
void read_fallback_free(struct guest *g);
/* A read that the source has failed; true: it is answered from here on. */
bool read_fallback_take(struct request *r, int error);
void read_fallback_pump(struct guest *g);
/* The mirror is not steady any more, and somebody has not been told. */
bool read_fallback_due(const struct guest *g);
uint64_t read_fallback_deadline_ns(const struct guest *g);
/* Whether a request of this queue waits for the destination. */
bool read_fallback_waits(const struct guest *g, const struct queue *q);

#endif
