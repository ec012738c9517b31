/* SPDX-License-Identifier: Apache-2.0
 *
 * A source that fails in steady is left for the destination before the guest
 * notices (on_source_error=switch). See source_failover.c.
 */
#ifndef VS_SOURCE_FAILOVER_H
#define VS_SOURCE_FAILOVER_H

#include <stdbool.h>
#include <stdint.h>

struct disk_io;
struct guest;
struct request;

void source_failover_init(struct guest *g);
/* The source has failed a request (or its flush); true: it is kept back, and answered later. */
bool source_failover_park(struct request *r, const struct disk_io *io);
bool source_failover_park_flush(struct guest *g, const struct disk_io *io, uint64_t number);
/* Nothing goes to the source while one is pending; true: the request is kept back. */
bool source_failover_holds(struct request *r);
/* The disks are exchanged. */
void source_failover_over(struct guest *g);
/* There was no exchange: what has failed is answered so, the rest goes to the source. */
void source_failover_give_up(struct guest *g);
/* The mirror was lost meanwhile. */
bool source_failover_due(const struct guest *g, bool gate_closed);
void source_failover_pump(struct guest *g, bool gate_closed);

#endif
