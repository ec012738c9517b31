/* SPDX-License-Identifier: Apache-2.0
 *
 * What a run of fuzz_engine.c has: one engine, its disks, a guest and its
 * frontend; and how the control plane asks it and listens to it.
 */
#ifndef VS_FUZZ_ENGINE_WORLD_H
#define VS_FUZZ_ENGINE_WORLD_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <time.h>

#include "driver.h"
#include "test_disk.h"
#include "testing.h"

#define MEMORY_BYTES (1u << 20)
#define BORDER (MEMORY_BYTES / 2)
#define CAPACITY (1u << 19)        /* at the beginning */
#define DISK_BYTES (2u * CAPACITY) /* so far may the guest's disk grow */
#define LANES 2
#define DISKS_MAX 6
#define PATIENCE_MS 60000

#define ENSURE(condition)                                                     \
    do {                                                                      \
        if (!(condition)) {                                                   \
            fprintf(stderr, "required: %s, line %d\n", #condition, __LINE__); \
            __builtin_trap();                                                 \
        }                                                                     \
    } while (0)

struct answer {
    uint64_t token;
    int result;
    uint64_t value;
};

static struct world {
    struct choices c;
    vs_engine *engine;
    bool attentive;           /* events that want an answer of the control plane get it */
    vs_disk *disk[DISKS_MAX]; /* every one that there ever was; a reference of ours each */
    unsigned disks;
    int source, destination; /* which of them; destination: the last one, -1: there was none */
    uint64_t capacity;
    uint32_t state;
    bool spoilt;   /* a disk cannot be read somewhere */
    int bitmap_fd; /* -1: there is no bitmap */
    uint64_t bitmap_bytes;
    uint64_t grow_token, grow_capacity;

    uint32_t attachment; /* the one that is the guest's */
    bool packed;         /* its rings; one of the two of each lane */
    struct ring ring[LANES];
    struct packed_driver packed_ring[LANES];
    struct driver driver[LANES];
    int kick[LANES], call[LANES];

    struct answer answer[64]; /* of late, for wait_for() */
    unsigned answers;
} w;

static struct guest guest;

/* ---- commands ------------------------------------------------------------------ */

static void close_all(const struct vs_command *c)
{
    if (c->fd >= 0)
        close(c->fd);
    if (c->kind != VS_CMD_SET_MEM_TABLE && c->kind != VS_CMD_ADD_MEM_REGION && c->kind != VS_CMD_REMOVE_MEM_REGION)
        return;
    for (unsigned i = 0; i < c->memory.count; i++)
        close(c->memory.region[i].fd);
}

static uint64_t submit(const struct vs_command *c)
{
    uint64_t token = vs_engine_submit(w.engine, c);
    if (!token)
        close_all(c);
    return token;
}

static uint64_t simple(uint32_t kind, uint64_t value)
{
    return submit(&(struct vs_command){.kind = kind, .fd = -1, .attachment = w.attachment, .value = value});
}

/* ---- events -------------------------------------------------------------------- */

static void note_answer(const struct vs_event *e)
{
    w.answer[w.answers++ % 64] = (struct answer){e->token, e->result, e->value};
    if (e->token != w.grow_token)
        return;
    w.grow_token = 0;
    if (e->result < 0)
        return;
    w.capacity = w.grow_capacity;
    for (unsigned i = 0; i < LANES; i++)
        w.driver[i].capacity_bytes = w.capacity;
}

/* What the control plane would do about it, in the shortest way. (No choice is taken here: events come when they
 * come.) */
static void react(const struct vs_event *e)
{
    switch (e->kind) {
    case VS_EV_DEGRADED:
        simple(VS_CMD_RECORD_WRITTEN, 0);
        return;
    case VS_EV_BITMAP_FAILED:
        simple(VS_CMD_BITMAP_VOID, 0);
        return;
    case VS_EV_AHEAD_DRAINED:
        simple(VS_CMD_CATCH_UP, 0);
        return;
    default:
        return;
    }
}

static bool next_event(int wait_ms)
{
    struct pollfd p = {.fd = vs_engine_event_fd(w.engine), .events = POLLIN};
    struct vs_event e;
    while (!vs_engine_next_event(w.engine, &e))
        if (poll(&p, 1, wait_ms) == 0)
            return false;
    ENSURE(e.kind >= VS_EV_DONE);
    if (e.kind == VS_EV_STATE)
        w.state = (uint32_t)e.value;
    if (e.kind == VS_EV_DONE)
        note_answer(&e);
    else if (w.attentive)
        react(&e);
    return true;
}

static bool answered(uint64_t token, struct answer *out)
{
    for (unsigned i = 0; i < 64 && i < w.answers; i++)
        if (w.answer[i].token == token) {
            *out = w.answer[i];
            return true;
        }
    return false;
}

static struct answer wait_for(uint64_t token)
{
    struct answer a;
    ENSURE(token);
    while (!answered(token, &a))
        ENSURE(next_event(PATIENCE_MS));
    return a;
}

/* The result, or -EAGAIN: too many commands are under way. */
static int command(uint32_t kind, uint64_t value)
{
    uint64_t token = simple(kind, value);
    return token ? wait_for(token).result : -EAGAIN;
}

/* ---- what it shows --------------------------------------------------------------- */

static void ensure_ranges(const struct vs_range *range, uint32_t count)
{
    ENSURE(count <= VS_RANGES_MAX);
    for (uint32_t i = 0; i < count; i++)
        ENSURE(range[i].length > 0 && range[i].offset <= DISK_BYTES && range[i].length <= DISK_BYTES - range[i].offset);
}

static bool look(struct vs_snapshot *s)
{
    struct vs_queue_stats q;
    if (command(VS_CMD_SNAPSHOT, 0) < 0)
        return false;
    vs_engine_snapshot(w.engine, s);
    for (unsigned i = 0; i < LANES; i++) {
        vs_engine_queue_stats(w.engine, i, &q);
        ENSURE(q.broken <= VS_BREACH_NO_STATUS);
    }
    ENSURE(s->mirror_state <= VS_DEGRADED);
    ENSURE(s->counts.source_flushed <= s->counts.source_generation);
    ENSURE(s->counts.flush_request <= s->counts.source_generation);
    ENSURE(!s->counts.mirrored_known || (s->counts.writes_flushed <= s->counts.writes_mirrored &&
                                         s->counts.writes_mirrored <= s->counts.source_generation));
    ENSURE(s->copy_bytes_done <= s->copy_bytes_total && s->copy_bytes_sparse <= s->copy_bytes_done);
    ENSURE(s->differing_bytes <= DISK_BYTES);
    ENSURE(s->pause_held <= s->requests_waiting && (s->paused || s->pause_held == 0));
    ensure_ranges(s->doubt, s->doubt_count);
    ensure_ranges(s->spared, s->spared_count);
    ensure_ranges(s->unreadable, s->unreadable_count);
    ensure_ranges(s->verify_ranges, s->verify_range_count);
    return true;
}

#endif
