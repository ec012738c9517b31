/* SPDX-License-Identifier: Apache-2.0
 *
 * The control plane's side of an engine that runs (shim_api.h): it talks to the
 * mailbox, and to nothing else that the engine's thread has.
 */
#include "shim.h"

#include "engine_state.h"

uint64_t vs_engine_submit(vs_engine *e, const struct vs_command *command)
{
    return mailbox_submit(&e->mailbox, command);
}

int vs_engine_next_event(vs_engine *e, struct vs_event *out)
{
    return mailbox_next_event(&e->mailbox, out);
}

int vs_engine_event_fd(vs_engine *e)
{
    return e->mailbox.event_fd;
}

void vs_engine_snapshot(vs_engine *e, struct vs_snapshot *out)
{
    mailbox_snapshot(&e->mailbox, out);
}

void vs_engine_queue_stats(vs_engine *e, uint32_t queue, struct vs_queue_stats *out)
{
    mailbox_queue_stats(&e->mailbox, queue, out);
}
