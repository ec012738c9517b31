/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine's thread: its loop, its beginning and its end.
 * Further threads only do a share of the disks' work (io_threads.c).
 *
 * The thread sleeps in io_uring_enter and nowhere else. It is woken by
 * completions, by kicks and the mailbox (multishot polls on the same ring) and
 * by the nearest deadline, which is passed to the wait: no timer runs, and an
 * idle engine does not wake.
 */
#include "engine_state.h"

#include <errno.h>
#include <poll.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bitmap_file.h"
#include "clock.h"
#include "engine_command.h"
#include "frontend_patience.h"
#include "read_fallback.h"
#include "request.h"
#include "request_path.h"
#include "serving.h"
#include "source_failover.h"
#include "switching.h"

/* How long the end waits for a destination (or source) that does not answer. */
#define QUIT_PATIENCE_NS 2000000000u

/* ---- the loop ------------------------------------------------------------ */

struct mailbox_watch {
    struct uring_op op;
    struct vs_engine *engine;
    bool signalled;
};

static void watch_mailbox(struct mailbox_watch *w)
{
    struct io_uring_sqe *sqe = uring_sqe(&w->engine->uring, &w->op);
    io_uring_prep_poll_multishot(sqe, w->engine->mailbox.wake_fd, POLLIN);
    io_uring_sqe_set_data(sqe, &w->op);
}

static void mailbox_signalled(struct uring_op *op, int result, unsigned flags)
{
    struct mailbox_watch *w = container_of(op, struct mailbox_watch, op);
    w->signalled = true;
    if (!(flags & IORING_CQE_F_MORE) && result != -ECANCELED)
        watch_mailbox(w);
}

static void take_commands(struct vs_engine *e, struct mailbox_watch *w)
{
    struct mailbox_command c;
    uint64_t counter;
    if (!w->signalled)
        return;
    w->signalled = false;
    if (read(e->mailbox.wake_fd, &counter, sizeof counter) < 0)
        assert(errno == EAGAIN || errno == EINTR);
    /* No more than there are now: each answer may bring the next command, and the guest waits. */
    for (unsigned left = mailbox_waiting(&e->mailbox); left > 0 && mailbox_next_command(&e->mailbox, &c); left--)
        engine_command(e, c.token, &c.command);
    if (mailbox_waiting(&e->mailbox) > 0)
        mailbox_wake(&e->mailbox);
    e->quit = mailbox_stopped(&e->mailbox);
}

static uint64_t min_ns(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* ---- time that was not lived through (clock.h) -------------------------------- */

/* While somebody's patience runs, no sleep is longer, or a gap within it would look like sleep. */
#define PATIENT_SLEEP_NS 250000000u

static void look_at_clock(struct vs_engine *e, uint64_t slept_ns)
{
    uint64_t now = clock_ns(), gap_ns = clock_gap_ns(&e->clock_gaps, now - e->host.now_ns, slept_ns);
    clock_missed_ns += gap_ns;
    e->host.now_ns = now - gap_ns;
}

static uint64_t patience_ends_ns(const struct vs_engine *e)
{
    uint64_t deadline = e->gate == GATE_CLOSING ? e->gate_deadline_ns : UINT64_MAX;
    deadline = min_ns(deadline, mirror_deadline_ns(&e->mirror));
    deadline = min_ns(deadline, attachments_deadline_ns(&e->guest));
    return min_ns(deadline, read_fallback_deadline_ns(&e->guest));
}

static struct outlook outlook(const struct vs_engine *e)
{
    return (struct outlook){
        /* Who is held by a limit has nothing to gain from a thread that stays awake. */
        .takes_up = guest_is_taken_up(&e->guest.load) && !serving_is_limited(&e->guest),
        .disk = e->mirror.source.disk->stats.in_flight > 0 ||
                (e->mirror.destination.disk && e->mirror.destination.disk->stats.in_flight > 0),
        .flush = e->mirror.flush.waiting > 0,
        .flushed_ns = e->mirror.flush.answered_ns,
    };
}

/* How long the loop may sleep. */
static uint64_t wait_ns(const struct vs_engine *e)
{
    uint64_t deadline, patience = patience_ends_ns(e), now;
    if (serving_is_due(&e->guest) || !list_empty(&e->host.done) || io_threads_returned(&e->host.threads) ||
        e->mirror.difference.more || e->mirror.verifier.more || e->quit || read_fallback_due(&e->guest) ||
        source_failover_due(&e->guest, e->gate == GATE_CLOSED) || e->mirror.state.durability_changed)
        return 0;
    deadline = serving_deadline_ns(&e->guest);
    deadline = min_ns(deadline, copier_deadline_ns(&e->mirror.copier));
    deadline = min_ns(deadline, pull_ahead_deadline_ns(&e->mirror.ahead));
    deadline = min_ns(deadline, difference_deadline_ns(&e->mirror.difference));
    deadline = min_ns(deadline, verifier_deadline_ns(&e->mirror.verifier));
    if (patience != UINT64_MAX)
        deadline = min_ns(deadline, min_ns(patience, engine_now(e) + PATIENT_SLEEP_NS));
    if (deadline == UINT64_MAX)
        return UINT64_MAX;
    now = clock_ns();
    return deadline > now ? deadline - now : 0;
}

/* What the disks have done. */
static void reap(struct vs_engine *e, uint64_t slept_ns)
{
    look_at_clock(e, slept_ns);
    uring_reap(&e->uring);
    io_threads_take_back(&e->host.threads);
    disk_run_done(&e->host);
}

/* One pass. The guest is told what is done before the destination is looked
 * after, so that its next request and our replication overlap. */
static void pass(struct vs_engine *e, struct mailbox_watch *w, uint64_t slept_ns)
{
    reap(e, slept_ns);
    take_commands(e, w);
    poller_begin(&e->guest.poller, outlook(e));
    serving_pump(&e->guest);
    io_threads_wake(&e->host.threads);
    look_at_clock(e, 0);
    disk_run_done(&e->host); /* what completed at once */
    read_fallback_pump(&e->guest);
    source_failover_pump(&e->guest, e->gate == GATE_CLOSED);
    request_path_pump(&e->guest);
    guest_flush_pump(&e->mirror.flush);
    activity_pump(&e->activity);
    queues_notify(&e->guest.frontends);
    replicator_pump(&e->mirror.replicator);
    copier_pump(&e->mirror.copier);
    if (list_empty(&e->guest.frontends.stalled) || !guest_is_taken_up(&e->guest.load))
        /* Who waited for room does not any more: stopped, gone, or held by a switch. */
        tap_wait_is_over(&e->mirror.tap);
    serving_watch_limits(&e->guest);
    mirror_pump(&e->mirror);
    difference_pump(&e->mirror.difference);
    verifier_pump(&e->mirror.verifier);
    grow_pump(&e->mirror.grow);
    pull_ahead_pump(&e->mirror.ahead);
    attachments_check_deadlines(&e->guest);
    attachments_check_memory(&e->guest.frontends);
    gate_pump(e);
    /* After all that may change a disk. */
    heartbeat_pump(&e->heartbeat, &e->activity, e->host.changes,
                   e->mirror.destination.disk || e->mirror.destination.former);
    io_threads_wake(&e->host.threads);
}

/* Sleeps in the kernel, unless something has come back meanwhile. */
static void sleep_ns(struct vs_engine *e, uint64_t ns)
{
    if (ns && !io_threads_may_sleep(&e->host.threads))
        ns = 0;
    uring_enter(&e->uring, ns);
    io_threads_awake(&e->host.threads);
}

static bool idle_for_good(const struct vs_engine *e)
{
    return mirror_is_idle(&e->mirror) && !e->guest.frontends.bells.outside && !e->activity.in_flight &&
           !e->heartbeat.in_flight && list_empty(&e->host.done);
}

/* The end: nothing new is taken up; what the disks have must come back, or the
 * memory that they may still write to is left to them (false). Those that do not
 * answer are cut off, where they can be, and get as long again. */
static bool wind_up(struct vs_engine *e)
{
    uint64_t deadline = engine_now(e) + QUIT_PATIENCE_NS;
    bool cut_off = false;
    guest_answers_end(&e->guest);
    mirror_stop(&e->mirror, VS_REASON_COMMAND);
    e->gate = GATE_CLOSED;
    guest_hold(&e->guest, GUEST_HOLD_SWITCH);
    bells_cancel(&e->guest.frontends.bells);
    kick_watches_stop_emptying(&e->guest.frontends.watches);
    while (!idle_for_good(e)) {
        uint64_t wait = list_empty(&e->host.done) ? min_ns(deadline - engine_now(e), PATIENT_SLEEP_NS) : 0;
        if (engine_now(e) >= deadline) {
            if (cut_off || !mirror_cut_off(&e->mirror))
                return false;
            cut_off = true;
            deadline = engine_now(e) + QUIT_PATIENCE_NS;
            continue;
        }
        io_threads_wake(&e->host.threads);
        sleep_ns(e, wait);
        reap(e, wait);
        queues_notify(&e->guest.frontends);
    }
    return true;
}

struct start {
    struct vs_engine *engine;
    sem_t ready;
    int result;
    const char *step;
};

static void *run(void *arg)
{
    struct start *start = arg;
    struct vs_engine *e = start->engine;
    struct mailbox_watch watch = {.op.complete = mailbox_signalled, .engine = e};
    io_thread_begin("vhostsync-data");
    start->result = uring_init(&e->uring, URING_ENTRIES, URING_CQ_ENTRIES, &start->step);
    if (start->result < 0) {
        sem_post(&start->ready);
        return NULL;
    }
    start->result = io_threads_start(&e->host.threads, e->config.threads, e->mailbox.wake_fd, &start->step);
    if (start->result < 0) {
        uring_free(&e->uring);
        sem_post(&start->ready);
        return NULL;
    }
    e->guest.frontends.bells.uring = &e->uring;
    watch_mailbox(&watch);
    e->host.now_ns = clock_ns();
    sem_post(&start->ready); /* "start" is gone from here on */
    while (!e->quit) {
        uint64_t wait = wait_ns(e);
        if (wait && poller_look(&e->guest.poller, outlook(e), wait))
            wait = 0;
        sleep_ns(e, wait);
        if (wait) {
            e->wakeups++;
            poller_woken(&e->guest.poller);
        }
        pass(e, &watch, wait);
    }
    e->quit = wind_up(e);
    e->guest.frontends.bells.uring = NULL;
    if (e->quit) {
        io_threads_stop(&e->host.threads);
        uring_free(&e->uring);
    }
    sem_post(&e->ended);
    /* A thread that ends waits in the kernel for its ring's requests, for as long as a disk hangs. */
    while (!e->quit)
        pause();
    return NULL;
}

/* ---- beginning and end --------------------------------------------------- */

static void free_engine(struct vs_engine *e)
{
    drains_free(e);
    requests_free(&e->guest); /* before the memory that its requests pin */
    frontends_free(&e->guest.frontends);
    read_fallback_free(&e->guest);
    mirror_free(&e->mirror);
    activity_free(&e->activity);
    if (e->config.bitmap)
        vs_bitmap_close(e->config.bitmap);
    disk_host_free(&e->host);
    mailbox_free(&e->mailbox);
    free(e);
}

static int init_mirror(struct vs_engine *e)
{
    return mirror_init(&e->mirror,
                       &(struct mirror_host){.disks = &e->host,
                                             .mailbox = &e->mailbox,
                                             .activity = &e->activity,
                                             .listener = &e->guest.listener,
                                             .load = &e->guest.load,
                                             .request_limit_bytes = &e->guest.limits.capacity_bytes},
                       &e->config);
}

static int init_engine(struct vs_engine *e, const char **step)
{
    int rc;
    disk_host_init(&e->host, &e->uring, e->mailbox.wake_fd);
    e->guest.config = &e->config;
    e->guest.host = &e->host;
    e->guest.mailbox = &e->mailbox;
    e->guest.mirror = &e->mirror;
    e->guest.activity = &e->activity;
    frontends_init(&e->guest.frontends, &e->mailbox, &e->host, &e->config);
    poller_init(&e->guest.poller, &e->host, e->config.poll_us);
    serving_init(&e->guest);
    source_failover_init(&e->guest);
    request_path_init(&e->guest);
    *step = "allocation of the engine's buffers";
    if ((rc = requests_init(&e->guest)) < 0 || (rc = init_mirror(e)) < 0 || (rc = read_fallback_init(&e->guest)) < 0 ||
        (rc = activity_init(&e->activity, e->config.bitmap, &e->uring, &e->mailbox)) < 0)
        return rc;
    return heartbeat_init(&e->heartbeat, &e->uring, e->config.bitmap);
}

static bool ranges_ok(const struct vs_range *range, uint32_t count, uint64_t capacity)
{
    if (count > VS_RANGES_MAX)
        return false;
    for (uint32_t i = 0; i < count; i++)
        if (range[i].length == 0 || range[i].offset >= capacity || range[i].length > capacity - range[i].offset)
            return false;
    return true;
}

static bool doubt_ok(const struct vs_engine_config *c)
{
    return ranges_ok(c->doubt, c->doubt_count, c->capacity_bytes) &&
           ranges_ok(c->spared, c->spared_count, c->capacity_bytes);
}

static bool config_ok(const struct vs_engine_config *c, const vs_disk *source)
{
    uint32_t region = c->dirty_region_bytes;
    return (c->block_bytes == 512 || c->block_bytes == 4096) && c->capacity_bytes > 0 &&
           c->capacity_bytes % c->block_bytes == 0 && c->capacity_bytes <= source->bytes && c->threads >= 1 &&
           c->threads <= VS_THREADS_MAX && source->block_bytes <= c->block_bytes && c->checkpoint_us > 0 &&
           region >= 4096 && region <= VS_DIRTY_REGION_BYTES_MAX && (region & (region - 1)) == 0 &&
           (!c->bitmap || bitmap_fits(c->bitmap, c->capacity_bytes, region)) && doubt_ok(c) &&
           rate_limit_possible(&c->limits) &&
           (!c->pull_ahead ||
            (c->congestion_fill_bytes > 0 && c->congestion_fill_bytes <= c->log_bytes && c->ahead_backoff_us > 0));
}

int vs_engine_create(const struct vs_engine_config *config, vs_disk *source, vs_engine **out, const char **step)
{
    struct start start = {.step = "pthread_create"};
    struct vs_engine *e;
    int rc;
    *step = "configuration";
    if (!config_ok(config, source))
        return -EINVAL;
    e = calloc(1, sizeof *e);
    if (!e)
        return -ENOMEM;
    e->config = *config;
    e->guest.limits = (struct blk_limits){config->capacity_bytes, config->block_bytes, config->read_only};
    guest_memory_catch_sigbus();
    rc = mailbox_init(&e->mailbox, step);
    if (rc < 0) {
        free(e);
        return rc;
    }
    rc = init_engine(e, step);
    if (rc < 0) {
        e->config.bitmap = NULL; /* still the caller's */
        free_engine(e);
        return rc;
    }
    mirror_set_source(&e->mirror, source);
    start.engine = e;
    sem_init(&start.ready, 0, 0);
    sem_init(&e->ended, 0, 0);
    rc = -pthread_create(&e->thread, NULL, run, &start);
    if (rc == 0) {
        while (sem_wait(&start.ready) < 0)
            ;
        rc = start.result;
        if (rc < 0)
            pthread_join(e->thread, NULL);
    }
    sem_destroy(&start.ready);
    if (rc < 0) {
        *step = start.step;
        e->config.bitmap = NULL;
        free_engine(e);
        return rc;
    }
    *out = e;
    return 0;
}

int vs_engine_rings_restricted(const vs_engine *e)
{
    return e->uring.unrestricted ? e->uring.unrestricted : io_threads_unrestricted(&e->host.threads);
}

uint32_t vs_engine_stop(vs_engine *e)
{
    uint32_t unanswered;
    mailbox_stop(&e->mailbox);
    while (sem_wait(&e->ended) < 0)
        ;
    if (!e->quit)
        return 1u << VS_SOURCE |
               1u << VS_DESTINATION; /* a disk still owns buffers: they stay mapped until the process ends */
    pthread_join(e->thread, NULL);
    unanswered = mirror_unanswered(&e->mirror);
    disk_close(e->mirror.source.disk);
    if (e->mirror.destination.disk)
        disk_close(e->mirror.destination.disk);
    if (e->mirror.destination.former)
        disk_close(e->mirror.destination.former);
    if (e->config.bitmap)
        vs_bitmap_close(e->config.bitmap);
    e->config.bitmap = NULL;
    return unanswered;
}

void vs_engine_free(vs_engine *e)
{
    if (e->quit)
        free_engine(e);
}

uint32_t vs_engine_destroy(vs_engine *e)
{
    uint32_t unanswered = vs_engine_stop(e);
    vs_engine_free(e);
    return unanswered;
}
