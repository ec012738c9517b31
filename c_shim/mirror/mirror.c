/* SPDX-License-Identifier: Apache-2.0
 *
 * Puts the rooms of the mirror together, and does what concerns several of them: a destination comes, becomes steady,
 * is lost or let go, or changes places with the source. See mirror.h.
 */
#include "mirror.h"

#include <assert.h>
#include <errno.h>

#include "mailbox.h"

/* The copy gives way above this part of what makes the guest get ahead. */
#define COPY_FILL 4u

static void steady_flushed(struct destination_io *io, bool current);

static void destination_lost(struct destination *d, uint32_t reason, int error)
{
    mirror_degrade(container_of(d, struct mirror, destination), reason, error);
}

/* ---- its rooms, and which of the others each may use --------------------------- */

static void init_low_rooms(struct mirror *m, const struct vs_engine_config *config)
{
    struct mailbox *mailbox = m->given.mailbox;
    range_slots_init(&m->source.slots);
    m->source.capacity_bytes = config->capacity_bytes;
    m->source.block_bytes = config->block_bytes;
    destination_init(&m->destination, mailbox, destination_lost);
    m->state = (struct mirror_state){
        .counts = &m->counts, .bad = &m->bad, .listener = m->given.listener, .mailbox = mailbox, .capture.epoch = 1};
    bad_ranges_load(&m->bad, config);
    m->tap = (struct tap){.log = &m->log,
                          .counts = &m->counts,
                          .state = &m->state,
                          .bad = &m->bad,
                          .difference = &m->difference,
                          .host = m->given.disks,
                          .pull_ahead_bytes = config->pull_ahead ? config->congestion_fill_bytes : 0};
    throttle_init(&m->tap.throttle, config->log_bytes, config->max_lag_us * 1000);
    guest_flush_init(&m->flush, &(struct guest_flush_rooms){.destination = &m->destination,
                                                            .source = &m->source,
                                                            .counts = &m->counts,
                                                            .state = &m->state,
                                                            .listener = m->given.listener,
                                                            .load = m->given.load,
                                                            .host = m->given.disks,
                                                            .mailbox = mailbox});
}

static int init_difference(struct mirror *m, const struct vs_engine_config *config)
{
    return difference_init(&m->difference,
                           &(struct difference_rooms){.destination = &m->destination,
                                                      .source = &m->source,
                                                      .counts = &m->counts,
                                                      .log = &m->log,
                                                      .state = &m->state,
                                                      .uncopied = &m->uncopied,
                                                      .bad = &m->bad,
                                                      .listener = m->given.listener,
                                                      .load = m->given.load,
                                                      .host = m->given.disks,
                                                      .mailbox = m->given.mailbox},
                           config);
}

static int init_replicator(struct mirror *m)
{
    return replicator_init(&m->replicator, &(struct replicator_rooms){.destination = &m->destination,
                                                                      .log = &m->log,
                                                                      .counts = &m->counts,
                                                                      .state = &m->state,
                                                                      .throttle = &m->tap.throttle,
                                                                      .uncopied = &m->uncopied,
                                                                      .listener = m->given.listener,
                                                                      .host = m->given.disks});
}

static int init_copier(struct mirror *m, const struct vs_engine_config *config)
{
    uint64_t give_way = config->congestion_fill_bytes / COPY_FILL;
    return copier_init(&m->copier,
                       &(struct copier_rooms){.destination = &m->destination,
                                              .source = &m->source,
                                              .state = &m->state,
                                              .uncopied = &m->uncopied,
                                              .difference = &m->difference,
                                              .bad = &m->bad,
                                              .log = &m->log,
                                              .flush = &m->flush,
                                              .load = m->given.load,
                                              .host = m->given.disks,
                                              .mailbox = m->given.mailbox,
                                              .give_way_bytes = config->pull_ahead ? give_way + !give_way : 0},
                       config->copy_depth);
}

static int init_verifier(struct mirror *m)
{
    return verifier_init(&m->verifier, &(struct verifier_rooms){.destination = &m->destination,
                                                                .source = &m->source,
                                                                .counts = &m->counts,
                                                                .state = &m->state,
                                                                .bad = &m->bad,
                                                                .difference = &m->difference,
                                                                .load = m->given.load,
                                                                .host = m->given.disks,
                                                                .mailbox = m->given.mailbox});
}

static void init_high_rooms(struct mirror *m, const struct vs_engine_config *config)
{
    pull_ahead_init(&m->ahead,
                    &(struct pull_ahead_rooms){.state = &m->state,
                                               .tap = &m->tap,
                                               .log = &m->log,
                                               .counts = &m->counts,
                                               .difference = &m->difference,
                                               .copier = &m->copier,
                                               .replicator = &m->replicator,
                                               .verifier = &m->verifier,
                                               .uncopied = &m->uncopied,
                                               .load = m->given.load,
                                               .host = m->given.disks,
                                               .mailbox = m->given.mailbox},
                    config);
    grow_init(&m->grow, &(struct grow_rooms){.destination = &m->destination,
                                             .source = &m->source,
                                             .state = &m->state,
                                             .uncopied = &m->uncopied,
                                             .copier = &m->copier,
                                             .difference = &m->difference,
                                             .activity = m->given.activity,
                                             .request_limit_bytes = m->given.request_limit_bytes,
                                             .load = m->given.load,
                                             .host = m->given.disks,
                                             .mailbox = m->given.mailbox});
}

static void init_probe(struct mirror *m)
{
    idle_probe_init(&m->probe, &(struct idle_probe_rooms){
                                   .destination = &m->destination, .load = m->given.load, .host = m->given.disks});
}

int mirror_init(struct mirror *m, const struct mirror_host *host, const struct vs_engine_config *config)
{
    uint32_t region = config->dirty_region_bytes < COPY_BYTES ? config->dirty_region_bytes : COPY_BYTES;
    int rc;
    m->given = *host;
    m->timeout_ns = config->destination_timeout_us * 1000;
    m->pauses = config->pause_on_destination_error;
    m->steady.io.io.kind = VS_DISK_FLUSH;
    m->steady.io.done = steady_flushed;
    init_low_rooms(m, config);
    if ((rc = repl_log_init(&m->log, config->log_bytes)) < 0 || (rc = init_difference(m, config)) < 0 ||
        (rc = init_replicator(m)) < 0 || (rc = init_copier(m, config)) < 0 || (rc = init_verifier(m)) < 0)
        return rc;
    init_high_rooms(m, config);
    init_probe(m);
    return dirty_map_init(&m->uncopied.regions, config->capacity_bytes, region); /* a region is copied as a whole */
}

void mirror_free(struct mirror *m)
{
    copier_free(&m->copier);
    verifier_free(&m->verifier);
    replicator_free(&m->replicator);
    repl_log_free(&m->log);
    dirty_map_free(&m->uncopied.regions);
    difference_free(&m->difference);
}

void mirror_set_source(struct mirror *m, vs_disk *source)
{
    disk_adopt(source, m->given.disks);
    disk_serve(source, true);
    m->source.disk = source;
}

void mirror_leave_bitmap(struct mirror *m)
{
    m->difference.differs.stored = NULL;
}

static uint64_t now_ns(const struct mirror *m)
{
    return m->given.disks->now_ns;
}

/* ---- a destination comes -------------------------------------------------------- */

int mirror_start(struct mirror *m, vs_disk *disk, uint32_t flags)
{
    bool resync = flags & VS_START_RESYNC;
    if (destination_attached(&m->destination) || m->destination.former || m->given.load->holds & GUEST_HOLD_SWITCH ||
        m->state.record != RECORD_WRITTEN)
        return -EBUSY;
    if (disk->bytes < m->source.capacity_bytes)
        return -ENOSPC;
    if (disk->block_bytes > m->source.block_bytes || (resync && !m->difference.tracked))
        return -EINVAL;
    destination_attach(&m->destination, disk, m->given.disks);
    idle_probe_begin(&m->probe);
    tap_begin(&m->tap);
    difference_attach(&m->difference, resync);
    pull_ahead_reset(&m->ahead);
    if (!(flags & VS_START_SPARE_DOUBT))
        bad_ranges_spare_none(&m->bad);
    copier_start(&m->copier);
    mirror_move(&m->state, VS_MIRROR_STARTED, VS_REASON_COMMAND, 0);
    return 0;
}

/* ---- the end of a destination ------------------------------------------ */

static void close_former(struct mirror *m)
{
    const vs_disk *former = m->destination.former;
    if (former && !former->stats.in_flight && !m->replicator.in_use && !m->uncopied.in_flight)
        destination_close_former(&m->destination);
}

/* Whatever is captured for it, queued for it or in flight to it belongs to a
 * former mirror from here on. */
static void give_up(struct mirror *m)
{
    destination_give_up(&m->destination);
    idle_probe_begin(&m->probe);
    m->steady.in_flight = false;
    replicator_drop(&m->replicator);
    copier_drop(&m->copier);
    difference_detach(&m->difference);
}

void mirror_degrade(struct mirror *m, uint32_t reason, int error)
{
    if (!destination_attached(&m->destination))
        return;
    give_up(m);
    if (m->state.now == VS_STEADY)
        mirror_pause(&m->state, m->pauses, now_ns(m));
    mirror_move(&m->state, VS_MIRROR_LOST, reason, error);
}

int mirror_leave(struct mirror *m)
{
    if (m->state.now != VS_STEADY)
        return -ENOTCONN;
    mirror_degrade(m, VS_REASON_GROUP, 0);
    return 0;
}

void mirror_stop(struct mirror *m, uint32_t reason)
{
    if (destination_attached(&m->destination))
        give_up(m);
    mirror_pause(&m->state, false, now_ns(m));
    if (m->state.now != VS_PASSTHROUGH)
        mirror_move(&m->state, VS_MIRROR_STOPPED, reason, 0);
}

bool mirror_cut_off(struct mirror *m)
{
    vs_disk *disks[] = {m->source.disk, m->destination.disk, m->destination.former};
    bool any = false;
    for (size_t i = 0; i < sizeof disks / sizeof disks[0]; i++)
        if (disks[i] && disks[i]->stats.in_flight && disk_cut_off(disks[i]))
            any = true;
    return any;
}

uint32_t mirror_unanswered(const struct mirror *m)
{
    const vs_disk *disk = m->destination.disk, *former = m->destination.former;
    bool destination = (disk && disk->unanswered) || (former && former->unanswered);
    return (uint32_t)m->source.disk->unanswered << VS_SOURCE | (uint32_t)destination << VS_DESTINATION;
}

bool mirror_is_idle(const struct mirror *m)
{
    const vs_disk *disks[] = {m->source.disk, m->destination.disk, m->destination.former};
    for (size_t i = 0; i < sizeof disks / sizeof disks[0]; i++)
        if (disks[i] && disks[i]->stats.in_flight)
            return false;
    return m->left_sources == 0;
}

/* ---- steady ------------------------------------------------------------ */

/* All regions are copied: what is on the destination now has to be durable there. And it has to be all that a guest
 * was told is durable, though only the source was asked: once what was confirmed so far is mirrored too. */
static void begin_steady(struct mirror *m)
{
    uint64_t prefix = log_mirrored_prefix(&m->log, m->counts.source_generation);
    if (!m->state.joining) {
        m->state.joining = true;
        m->state.joining_request = m->counts.flush_request;
    }
    if (prefix < m->state.joining_request)
        return;
    m->steady.in_flight = true;
    m->steady.capture_epoch = m->state.capture.epoch;
    m->steady.prefix = prefix;
    destination_submit(&m->destination, &m->steady.io);
}

static void steady_flushed(struct destination_io *io, bool current)
{
    struct mirror *m = container_of(io, struct mirror, steady.io);
    if (!current)
        return;
    m->steady.in_flight = false;
    if (m->steady.capture_epoch != m->state.capture.epoch)
        return; /* ahead of it meanwhile */
    m->state.joining = false;
    /* Whoever was held by it has asked before this flush began, and is decided by the counts. */
    mirror_pause(&m->state, false, now_ns(m));
    counts_enter_steady(&m->counts, m->steady.prefix);
    /* Writes that were mirrored while it was flushed. */
    counts_mirrored(&m->counts, log_mirrored_prefix(&m->log, m->counts.source_generation));
    pull_ahead_steady(&m->ahead);
    difference_hurry(&m->difference); /* what was copied has only the source's flush to wait for */
    mirror_move(&m->state, VS_MIRROR_COPIED, VS_REASON_COPY_DONE, 0);
}

static bool may_begin_steady(const struct mirror *m)
{
    return m->state.now == VS_SYNCING && !m->steady.in_flight && !m->state.capture.uncaptured &&
           uncopied_is_empty(&m->uncopied) && (m->state.joining || pull_ahead_may_be_steady(&m->ahead));
}

static uint64_t lost_ns(const struct mirror *m)
{
    uint64_t oldest, asked;
    if (!destination_attached(&m->destination))
        return UINT64_MAX;
    oldest = disk_oldest_ns(m->destination.disk);
    /* A destination that answers, but too slowly: neither a flush nor a blocked write waits longer (rule 7). */
    if (m->tap.waits_since_ns && m->tap.waits_since_ns < oldest)
        oldest = m->tap.waits_since_ns;
    asked = guest_flush_since_ns(&m->flush, NULL);
    if (asked < oldest)
        oldest = asked;
    return oldest == UINT64_MAX ? oldest : oldest + m->timeout_ns;
}

/* A former one that does not answer either. Where it can be cut off, its requests come back, and the fence is left to
 * whoever attaches it again (VS_EV_FENCE_CLEAR). */
static uint64_t former_cut_off_ns(const struct mirror *m)
{
    uint64_t oldest = destination_oldest_of_former_ns(&m->destination);
    return oldest == UINT64_MAX ? oldest : oldest + m->timeout_ns;
}

void mirror_pump(struct mirror *m)
{
    if (former_cut_off_ns(m) <= now_ns(m))
        destination_cut_off_former(&m->destination);
    close_former(m);
    bad_ranges_pump(&m->bad, &m->counts);
    if (destination_attached(&m->destination) && m->destination.disk->lost)
        mirror_degrade(m, VS_REASON_DESTINATION_LOST, -ENOTCONN);
    if (lost_ns(m) <= now_ns(m))
        mirror_degrade(m, VS_REASON_DESTINATION_TIMEOUT, -ETIMEDOUT);
    idle_probe_pump(&m->probe);
    if (may_begin_steady(m))
        begin_steady(m);
}

uint64_t mirror_deadline_ns(const struct mirror *m)
{
    uint64_t lost = lost_ns(m), cut_off = former_cut_off_ns(m), probe = idle_probe_deadline_ns(&m->probe);
    lost = lost < cut_off ? lost : cut_off;
    return lost < probe ? lost : probe;
}

/* ---- the exchange ------------------------------------------------------ */

/* A disk that is left behind with such ranges is no mirror of the other: they may differ there for ever. */
static bool ranges_forbid(const struct mirror *m, uint32_t flags)
{
    return bad_ranges_any(&m->bad) && (flags & ~VS_EXCHANGE_DIFFERENT) != VS_EXCHANGE_ACCEPT;
}

static int exchange_refused(const struct mirror *m, uint32_t flags, bool gated)
{
    bool keep = flags & VS_EXCHANGE_KEEP;
    if (m->state.now != VS_STEADY)
        return -ENOTCONN;
    if (!gated || ranges_forbid(m, flags) || (keep && !m->counts.source_flush_known))
        return -EBUSY;
    if (m->state.differs && !(flags & VS_EXCHANGE_DIFFERENT))
        return -EBADE;
    if (m->source.disk->stats.in_flight || m->destination.disk->stats.in_flight)
        return -EBUSY; /* somebody has asked for a flush behind the gate */
    if (m->destination.disk->lost || (keep && m->source.disk->lost))
        return -ENOTCONN; /* no request has met with that yet, and the guest's would be the first */
    return 0;
}

static void left_source_closed(struct disk_io *closing)
{
    vs_disk *disk = container_of(closing, struct vs_disk, closing);
    struct mirror *m = disk->closing_for;
    struct vs_event event = {.kind = VS_EV_SOURCE_CLOSED, .value = disk->unanswered};
    disk_free(disk);
    m->left_sources--;
    mailbox_post(m->given.mailbox, &event);
}

int mirror_exchange(struct mirror *m, uint32_t flags, bool gated)
{
    bool keep = flags & VS_EXCHANGE_KEEP;
    vs_disk *old = m->source.disk;
    int rc = exchange_refused(m, flags, gated);
    if (rc < 0)
        return rc;
    assert((m->given.load->in_flight == 0 || m->given.load->holds & GUEST_HOLD_SOURCE_FAILED) && log_drained(&m->log));
    counts_exchange(&m->counts, keep);
    m->source.disk = destination_exchange(&m->destination, keep ? old : NULL);
    idle_probe_begin(&m->probe);
    disk_serve(old, false);
    disk_serve(m->source.disk, true);
    if (keep) {
        mirror_move(&m->state, VS_MIRROR_SWITCHED_KEPT, VS_REASON_SWITCH, 0);
        return 0;
    }
    bad_ranges_forget(&m->bad); /* they spoke of the old source */
    difference_forget(&m->difference);
    m->left_sources++;
    disk_close_later(old, left_source_closed, m);
    mirror_move(&m->state, VS_MIRROR_SWITCHED, VS_REASON_SWITCH, 0);
    return 0;
}
