/* SPDX-License-Identifier: Apache-2.0
 *
 * The table of the mirror's moves, and what each move brings with it. See mirror_state.h.
 */
#include "mirror_state.h"

#include <assert.h>
#include <stddef.h>

#include "bad_ranges.h"
#include "counts.h"
#include "guest_side.h"
#include "mailbox.h"

/* from, event, to; and then: are writes captured, are the counts known, must the record say first that the destination
 * is outdated */
/* clang-format off */
static const struct vs_mirror_move moves[] = {
    {VS_PASSTHROUGH, VS_MIRROR_STARTED, VS_SYNCING, 1, 0, 0},
    {VS_DEGRADED, VS_MIRROR_STARTED, VS_SYNCING, 1, 0, 0},
    {VS_SYNCING, VS_MIRROR_COPIED, VS_STEADY, 1, 1, 0},
    {VS_SYNCING, VS_MIRROR_CONGESTED, VS_AHEAD, 0, 0, 0},
    {VS_STEADY, VS_MIRROR_CONGESTED, VS_AHEAD, 0, 0, 1},
    {VS_AHEAD, VS_MIRROR_CATCHES_UP, VS_SYNCING, 1, 0, 0},
    {VS_SYNCING, VS_MIRROR_LOST, VS_DEGRADED, 0, 0, 0},
    {VS_STEADY, VS_MIRROR_LOST, VS_DEGRADED, 0, 0, 1},
    {VS_AHEAD, VS_MIRROR_LOST, VS_DEGRADED, 0, 0, 0},
    {VS_SYNCING, VS_MIRROR_STOPPED, VS_PASSTHROUGH, 0, 0, 0},
    {VS_STEADY, VS_MIRROR_STOPPED, VS_PASSTHROUGH, 0, 0, 0},
    {VS_AHEAD, VS_MIRROR_STOPPED, VS_PASSTHROUGH, 0, 0, 0},
    {VS_DEGRADED, VS_MIRROR_STOPPED, VS_PASSTHROUGH, 0, 0, 0},
    {VS_STEADY, VS_MIRROR_SWITCHED, VS_PASSTHROUGH, 0, 0, 0},
    {VS_STEADY, VS_MIRROR_SWITCHED_KEPT, VS_STEADY, 1, 1, 0},
};
/* clang-format on */

const struct vs_mirror_move *vs_mirror_move_at(uint32_t place)
{
    return place < sizeof moves / sizeof moves[0] ? &moves[place] : NULL;
}

static const struct vs_mirror_move *move_of(uint32_t from, uint32_t event)
{
    const struct vs_mirror_move *move;
    for (uint32_t place = 0; (move = vs_mirror_move_at(place)); place++)
        if (move->from == from && move->event == event)
            return move;
    return NULL;
}

static void end_capture(struct mirror_state *s)
{
    struct capture *c = &s->capture;
    c->epoch++;
    c->on = false;
    c->uncaptured += c->captured;
    c->captured = 0;
    s->joining = false;
    bad_ranges_leave_steady(s->bad, s->counts);
    counts_leave_steady(s->counts);
    s->listener->capture_ended(s->listener);
}

static void post(const struct mirror_state *s, uint32_t kind, uint32_t reason, int error, bool differed)
{
    struct vs_event event = {.kind = kind, .value = s->now, .reason = reason, .result = error, .differed = differed};
    mailbox_post(s->mailbox, &event);
}

/* The destination of a steady mirror is no copy: it is known to differ, or lacks what could not be read, or what the
 * guest has written there since and is not durable yet. */
static bool differs(const struct mirror_state *s)
{
    return s->differs || bad_ranges_any(s->bad) || !bad_ranges_healed(s->bad, s->counts);
}

void mirror_move(struct mirror_state *s, enum vs_mirror_event event, uint32_t reason, int error)
{
    const struct vs_mirror_move *move = move_of(s->now, event);
    bool differed = move && move->record && differs(s);
    assert(move && "every move of the mirror is in the table");
    if (move->captures)
        s->capture.on = true;
    else
        end_capture(s);
    assert(s->counts->mirrored_known == move->counts);
    if (move->record)
        s->record = RECORD_PENDING;
    if (move->to == VS_STEADY || move->to == VS_SYNCING)
        s->consistent = move->to == VS_STEADY;
    s->now = move->to;
    durability_recheck(s);
    post(s, VS_EV_STATE, reason, error, false);
    if (move->record)
        post(s, VS_EV_DEGRADED, reason, error, differed);
}

void mirror_pause(struct mirror_state *s, bool on, uint64_t now_ns)
{
    struct vs_event event = {.kind = VS_EV_PAUSED, .value = on};
    if (s->pause.on == on)
        return;
    s->pause.on = on;
    s->pause.since_ns = now_ns;
    durability_recheck(s);
    mailbox_post(s->mailbox, &event);
}

void mirror_record_written(struct mirror_state *s, bool failed)
{
    s->record = failed ? RECORD_FAILED : RECORD_WRITTEN;
    durability_recheck(s);
}
