/* SPDX-License-Identifier: Apache-2.0
 *
 * What the engine shows of itself. See snapshot.c.
 */
#ifndef VS_SNAPSHOT_H
#define VS_SNAPSHOT_H

struct vs_engine;

/* Answers VS_CMD_SNAPSHOT: fills what vs_engine_snapshot() and vs_engine_queue_stats() return. */
void snapshot_take(struct vs_engine *e);

#endif
