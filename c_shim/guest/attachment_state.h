/* SPDX-License-Identifier: Apache-2.0
 *
 * Between attachment.c, which decides which rings run, and
 * attachment_command.c, which changes what they have. Nobody else's.
 */
#ifndef VS_ATTACHMENT_STATE_H
#define VS_ATTACHMENT_STATE_H

#include "attachment.h"

void queue_set_running(struct queue *q, bool running);
/* If nothing of it is in flight, what waited for that is answered. */
void queue_quiet(struct queue *q);

/* Which rings run, after any change of this attachment. */
void attachment_update(struct attachment *a);
/* The same after a change of the memory or of a ring's addresses. mapped_in: the table that was current until now. */
void attachment_map_rings(struct attachment *a, struct mem_table *mapped_in);
/* Before memory is taken away: the guest sees what is done. */
void attachment_show_done(struct attachment *a);
/* Its end, if it is closing and its last request is over. */
void attachment_maybe_closed(struct attachment *a);

#endif
