/* SPDX-License-Identifier: Apache-2.0
 *
 * Frontends' attachments: their memory, their rings, and when a ring runs.
 */
#ifndef VS_ATTACHMENT_H
#define VS_ATTACHMENT_H

#include "engine.h"

void attachments_init(struct vs_engine *e);
/* The engine's thread has ended, and its ring with it. */
void attachments_free(struct vs_engine *e);
/* Applies one of the commands VS_CMD_ATTACH .. VS_CMD_SET_WRITE_CACHE. Takes its descriptors (attachment_command.c). */
void attachment_command(struct vs_engine *e, uint64_t token, const struct vs_command *c);
/* Ends what a lost mapping has touched. */
void attachments_check_memory(struct vs_engine *e);
/* If a ring has waited too long to become quiet, the destination is given up, and a pause holds the ring's requests no
 * more; nor those of a frontend that has waited too long for its end or its memory. */
void attachments_check_deadlines(struct vs_engine *e);
uint64_t attachments_deadline_ns(const struct vs_engine *e);

/* The ring may have work. */
void queue_ready(struct queue *q);
/* A request of it was answered. */
void queue_finished_one(struct queue *q);
/* The guest's rubbish: this ring is not looked at again until it is set up anew. */
void queue_break(struct queue *q, uint32_t breach);
/* Shows the guest what was pushed since the last pass, one notification a ring. */
void queues_notify(struct vs_engine *e);

#endif
