/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine's part of a switch: drain, gate, exchange (switching.c). Each command's token is answered by an event.
 */
#ifndef VS_SWITCHING_H
#define VS_SWITCHING_H

#include <stdbool.h>
#include <stdint.h>

#include "shim.h"

struct vs_engine;

/* A flush of the destination, or of both disks, that covers all that the guest has written so far. */
void drain_begin(struct vs_engine *e, uint64_t token, bool both_disks);
/* At the engine's end: those that still wait are not answered. */
void drains_free(struct vs_engine *e);

/* Answered when it has closed (value: ns that took), or could not within allowed_us: -ETIMEDOUT. */
void gate_close(struct vs_engine *e, uint64_t token, uint64_t allowed_us);
void gate_pump(struct vs_engine *e);
/* Opens it; also while it closes: whoever asked for it has changed his mind. Returns the pause in nanoseconds. */
uint64_t gate_cancel(struct vs_engine *e);

/* The exchange, as soon as the gate is closed. Opens the gate, unless it fails or is told to hold; the answer's value
 * is the pause in nanoseconds. */
void switch_exchange(struct vs_engine *e, uint64_t token, const struct vs_exchange *what);

#endif
