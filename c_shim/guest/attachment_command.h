/* SPDX-License-Identifier: Apache-2.0
 *
 * What a frontend asks of its attachment. See attachment_command.c.
 */
#ifndef VS_ATTACHMENT_COMMAND_H
#define VS_ATTACHMENT_COMMAND_H

#include "attachment.h"

/* Applies one of the commands VS_CMD_ATTACH .. VS_CMD_SET_WRITE_CACHE. Takes its descriptors. */
void attachment_command(struct frontends *f, uint64_t token, const struct vs_command *c);

#endif
