/* SPDX-License-Identifier: Apache-2.0
 *
 * The lock, the queue of commands and the queue of events between the control plane and the engine's thread. See
 * mailbox.h.
 */
#include "mailbox.h"

#include <assert.h>
#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

static void wake(int fd)
{
    uint64_t one = 1;
    if (write(fd, &one, sizeof one) < 0)
        assert(errno == EAGAIN || errno == EINTR); /* full: the reader is woken anyway */
}

int mailbox_init(struct mailbox *m, const char **step)
{
    pthread_mutex_init(&m->lock, NULL);
    m->next_token = 1;
    m->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    m->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (m->wake_fd < 0 || m->event_fd < 0) {
        int rc = -errno;
        *step = "eventfd";
        mailbox_free(m);
        return rc;
    }
    return 0;
}

void mailbox_free(struct mailbox *m)
{
    struct mailbox_command c;
    while (mailbox_next_command(m, &c))
        command_close_fds(&c.command);
    if (m->wake_fd >= 0)
        close(m->wake_fd);
    if (m->event_fd >= 0)
        close(m->event_fd);
    pthread_mutex_destroy(&m->lock);
}

void command_close_fds(const struct vs_command *c)
{
    if (c->fd >= 0)
        close(c->fd);
    for (uint32_t i = 0; command_has_memory(c) && i < c->memory.count && i < VS_MEM_TABLE_REGIONS; i++)
        if (c->memory.region[i].fd >= 0)
            close(c->memory.region[i].fd);
}

bool mailbox_next_command(struct mailbox *m, struct mailbox_command *out)
{
    bool found;
    pthread_mutex_lock(&m->lock);
    found = m->command_count > 0;
    if (found) {
        *out = m->commands[m->command_head];
        m->command_head = (m->command_head + 1) % VS_COMMANDS_MAX;
        m->command_count--;
    }
    pthread_mutex_unlock(&m->lock);
    return found;
}

unsigned mailbox_waiting(struct mailbox *m)
{
    unsigned count;
    pthread_mutex_lock(&m->lock);
    count = m->command_count;
    pthread_mutex_unlock(&m->lock);
    return count;
}

void mailbox_wake(struct mailbox *m)
{
    wake(m->wake_fd);
}

bool mailbox_stopped(struct mailbox *m)
{
    bool stopped;
    pthread_mutex_lock(&m->lock);
    stopped = m->stop;
    pthread_mutex_unlock(&m->lock);
    return stopped;
}

void mailbox_post(struct mailbox *m, const struct vs_event *event)
{
    /* State changes are few and commands bounded, so only I/O errors can be dropped. */
    bool may_drop =
        event->kind == VS_EV_IO_ERROR || event->kind == VS_EV_QUEUE_BROKEN || event->kind == VS_EV_READ_FALLBACK;
    pthread_mutex_lock(&m->lock);
    if (m->event_count == EVENTS_MAX || (may_drop && m->event_count >= EVENTS_MAX / 4)) {
        m->events_lost++;
    } else {
        m->events[(m->event_head + m->event_count) % EVENTS_MAX] = *event;
        if (m->event_count++ == 0)
            wake(m->event_fd);
    }
    pthread_mutex_unlock(&m->lock);
}

void mailbox_done(struct mailbox *m, uint64_t token, int result, uint64_t value)
{
    struct vs_event event = {.kind = VS_EV_DONE, .token = token, .result = result, .value = value};
    mailbox_post(m, &event);
}

/* ---- the control plane's side ------------------------------------------ */

uint64_t mailbox_submit(struct mailbox *m, const struct vs_command *command)
{
    uint64_t token = 0;
    pthread_mutex_lock(&m->lock);
    if (m->commands_under_way < VS_COMMANDS_MAX && !m->stop) {
        struct mailbox_command *c = &m->commands[(m->command_head + m->command_count) % VS_COMMANDS_MAX];
        token = m->next_token++;
        c->token = token;
        c->command = *command;
        m->command_count++;
        m->commands_under_way++;
        wake(m->wake_fd);
    }
    pthread_mutex_unlock(&m->lock);
    return token;
}

bool mailbox_next_event(struct mailbox *m, struct vs_event *out)
{
    uint64_t counter;
    bool found = false;
    pthread_mutex_lock(&m->lock);
    if (m->event_count > 0) {
        *out = m->events[m->event_head];
        m->event_head = (m->event_head + 1) % EVENTS_MAX;
        m->event_count--;
        if (out->kind == VS_EV_DONE)
            m->commands_under_way--;
        found = true;
    } else if (read(m->event_fd, &counter, sizeof counter) < 0) {
        assert(errno == EAGAIN || errno == EINTR);
    }
    pthread_mutex_unlock(&m->lock);
    return found;
}

void mailbox_snapshot(struct mailbox *m, struct vs_snapshot *out)
{
    pthread_mutex_lock(&m->lock);
    *out = m->snapshot;
    pthread_mutex_unlock(&m->lock);
}

void mailbox_queue_stats(struct mailbox *m, uint32_t queue, struct vs_queue_stats *out)
{
    pthread_mutex_lock(&m->lock);
    *out = m->queue_stats[queue < VS_MAX_QUEUES ? queue : 0];
    pthread_mutex_unlock(&m->lock);
}

void mailbox_stop(struct mailbox *m)
{
    pthread_mutex_lock(&m->lock);
    m->stop = true;
    pthread_mutex_unlock(&m->lock);
    wake(m->wake_fd);
}
