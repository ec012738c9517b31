/* SPDX-License-Identifier: Apache-2.0
 *
 * The commands of the control plane. See engine_command.c.
 */
#ifndef VS_ENGINE_COMMAND_H
#define VS_ENGINE_COMMAND_H

#include "shim.h"

/* Applies it, and answers the token now or later. Takes its descriptors, and its disk on success. */
void engine_command(struct vs_engine *e, uint64_t token, const struct vs_command *c);

#endif
