/* SPDX-License-Identifier: Apache-2.0
 *
 * What the control plane asks for, command by command (shim_api.h). The
 * engine's thread applies each between two batches of requests. Most are
 * answered at once, the others by the room that they are for.
 */
#include "engine_command.h"

#include <errno.h>

#include "attachment_command.h"
#include "engine_state.h"
#include "serving.h"
#include "snapshot.h"
#include "source_failover.h"
#include "switching.h"

static void void_bitmap(struct vs_engine *e)
{
    if (!activity_may_void(&e->activity))
        return;
    mirror_leave_bitmap(&e->mirror);
    activity_void(&e->activity);
}

/* False: it is answered at once, with 0 or an error alone. */
static bool answered_later(struct vs_engine *e, uint64_t token, const struct vs_command *c)
{
    switch (c->kind) {
    case VS_CMD_MIRROR_DRAIN:
        drain_begin(e, token, c->value);
        return true;
    case VS_CMD_GROW:
        grow_begin(&e->mirror.grow, token, &c->grow);
        return true;
    case VS_CMD_DISK_SIZE:
        grow_measure(&e->mirror.grow, token, c->value);
        return true;
    case VS_CMD_GATE:
        gate_close(e, token, c->value);
        return true;
    case VS_CMD_EXCHANGE:
        switch_exchange(e, token, &c->exchange);
        return true;
    case VS_CMD_UNGATE:
        mailbox_done(&e->mailbox, token, 0, gate_cancel(e));
        return true;
    default:
        if (c->kind < VS_CMD_ATTACH || c->kind > VS_CMD_SET_WRITE_CACHE)
            return false;
        attachment_command(&e->guest.frontends, token, c);
        return true;
    }
}

/* The answer: 0 or a negative errno. */
static int obey(struct vs_engine *e, const struct vs_command *c)
{
    switch (c->kind) {
    case VS_CMD_MIRROR_START:
        return mirror_start(&e->mirror, c->start.disk, c->start.flags);
    case VS_CMD_VERIFY:
        return verifier_start(&e->mirror.verifier, c->verify.repair, c->verify.speed_bytes_per_s);
    case VS_CMD_VERIFY_STOP:
        return verifier_stop(&e->mirror.verifier);
    case VS_CMD_CATCH_UP:
        return pull_ahead_catch_up(&e->mirror.ahead);
    case VS_CMD_LIMIT:
        if (!rate_limit_possible(&c->limits))
            return -EINVAL;
        serving_limit(&e->guest, &c->limits);
        break;
    case VS_CMD_SNAPSHOT:
        snapshot_take(e);
        break;
    case VS_CMD_MIRROR_SPEED:
        copier_set_speed(&e->mirror.copier, c->value);
        break;
    case VS_CMD_MIRROR_STOP:
        mirror_stop(&e->mirror, (uint32_t)c->value);
        break;
    case VS_CMD_MIRROR_LEAVE:
        return mirror_leave(&e->mirror);
    case VS_CMD_PEER_DIFFERS:
        e->mirror.state.differs = c->value;
        break;
    case VS_CMD_GROW_STOP:
        grow_stop(&e->mirror.grow, -ECANCELED);
        break;
    case VS_CMD_BITMAP_VOID:
        void_bitmap(e);
        break;
    case VS_CMD_RECORD_WRITTEN:
        mirror_record_written(&e->mirror.state, c->value);
        break;
    case VS_CMD_FAILOVER_GIVE_UP:
        source_failover_give_up(&e->guest);
        break;
    default:
        command_close_fds(c);
        return -EINVAL;
    }
    return 0;
}

void engine_command(struct vs_engine *e, uint64_t token, const struct vs_command *c)
{
    if (!answered_later(e, token, c))
        mailbox_done(&e->mailbox, token, obey(e, c), 0);
}
