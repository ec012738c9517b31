/* SPDX-License-Identifier: Apache-2.0
 *
 * Commands from the control plane to the engine's thread, events back, and the
 * last snapshot. The only data that two threads share; one lock, never held
 * across a system call but the wake-up.
 */
#ifndef VS_MAILBOX_H
#define VS_MAILBOX_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "bounds.h"

struct mailbox_command {
    uint64_t token;
    struct vs_command command;
};

struct mailbox {
    pthread_mutex_t lock;
    int wake_fd;  /* eventfd: commands wait (also remote disk completions) */
    int event_fd; /* eventfd: events wait */
    bool stop;
    uint64_t next_token;
    unsigned commands_under_way; /* submitted, completion not fetched */
    struct mailbox_command commands[VS_COMMANDS_MAX];
    unsigned command_head, command_count;
    struct vs_event events[EVENTS_MAX];
    unsigned event_head, event_count;
    uint64_t events_lost;
    struct vs_snapshot snapshot;
    struct vs_queue_stats queue_stats[VS_MAX_QUEUES];
};

/* Of one that is all zero: it is large, and what is never used of it is never touched. */
int mailbox_init(struct mailbox *m, const char **step);
void mailbox_free(struct mailbox *m);

/* The engine's side. */
unsigned mailbox_waiting(struct mailbox *m);
bool mailbox_next_command(struct mailbox *m, struct mailbox_command *out);
/* Commands are left: come back. */
void mailbox_wake(struct mailbox *m);
bool mailbox_stopped(struct mailbox *m);
/* Events that are no completion are dropped, and counted, while the queue is half full. */
void mailbox_post(struct mailbox *m, const struct vs_event *event);
void mailbox_done(struct mailbox *m, uint64_t token, int result, uint64_t value);

/* The control plane's side (shim_api.h has what each promises). */
uint64_t mailbox_submit(struct mailbox *m, const struct vs_command *command);
bool mailbox_next_event(struct mailbox *m, struct vs_event *out);
void mailbox_snapshot(struct mailbox *m, struct vs_snapshot *out);
void mailbox_queue_stats(struct mailbox *m, uint32_t queue, struct vs_queue_stats *out);
/* The engine's thread is to end: no command is taken from here on. */
void mailbox_stop(struct mailbox *m);

/* Its "memory" counts. */
static inline bool command_has_memory(const struct vs_command *c)
{
    return c->kind == VS_CMD_SET_MEM_TABLE || c->kind == VS_CMD_ADD_MEM_REGION || c->kind == VS_CMD_REMOVE_MEM_REGION;
}
/* Closes the descriptors that a command brought. */
void command_close_fds(const struct vs_command *c);

#endif
