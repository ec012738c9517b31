/* SPDX-License-Identifier: Apache-2.0
 *
 * The map of where the two disks may differ, and the checkpoints that take regions off it again.
 *
 * Invariant (rule 4): while a peer is known, a region on which the two disks
 * may differ, after a power cut of either or both, has its bit in "differs".
 *
 *   - A write sets it before it is submitted to the source, a region copy
 *     before it is put on the destination.
 *   - It is cleared only by a checkpoint, whose flushes of *both* disks began
 *     after the last change of that region had reached both.
 *
 * A checkpoint covers the changes that were over when it began:
 *   1. "recent" becomes "settling", and a new "recent" begins with whatever is
 *      in flight at that moment: writes at the source (they have no place in
 *      the log yet), region copies and repairs. What is in the log is covered: its
 *      generation is at most G.
 *   2. When the destination holds all up to that G, both disks are flushed,
 *      unless guests' flushes have brought source_flushed and writes_flushed
 *      that far already. What is copied while the disk grows is in no count:
 *      until grow.c has flushed it, they are always flushed. (What the verifier
 *      repairs is in none either; it stays in flight until it is flushed.)
 *   3. Both flushed: a settling region is clean unless it is recent too, is
 *      still to be copied (a write that was left to the copy is not on the
 *      destination), or holds a range in doubt or unreadable. In slices: the guest does not
 *      wait for a large map.
 * If anything fails, settling is forgotten, and what differs stays.
 *
 * The map does not care which disk is the source, so it outlives a switch that
 * keeps the mirror. Checkpoints run in syncing and steady; without changes
 * there are none. In ahead there is one, the last: it covers the log and the
 * region copies as they were when capture ended, waits for both, and so keeps
 * what was achieved. All that is written meanwhile is in "recent", and stays
 * there until it is copied.
 */
#include "difference.h"

#include <assert.h>
#include <string.h>

#include "bad_ranges.h"
#include "bitmap_file.h"
#include "counts.h"
#include "guest_side.h"
#include "mailbox.h"
#include "mirror_state.h"
#include "repl_log.h"
#include "source.h"
#include "uncopied.h"

/* A guest that flushes by itself makes our own flushes needless: that part of the interval is waited for it. */
#define GUEST_FLUSH_CHANCE 6
#define SETTLE_WORDS 4096u

static void source_flushed(struct disk_io *io);
static void destination_flushed(struct destination_io *io, bool current);

/* The map as an earlier process has left it, if there was a peer; and the file follows it from here on. */
static void load_bitmap(struct difference *d, struct vs_bitmap *bitmap)
{
    if (d->tracked)
        bitmap_load(bitmap, &d->differs);
    d->differs.stored = bitmap_store;
    d->differs.keeper = bitmap;
}

int difference_init(struct difference *d, const struct difference_rooms *rooms, const struct vs_engine_config *config)
{
    uint64_t capacity = config->capacity_bytes;
    uint32_t region = config->dirty_region_bytes;
    int rc;
    *d = (struct difference){.rooms = *rooms, .interval_ns = config->checkpoint_us * 1000};
    list_init(&d->markers);
    d->source_io.kind = d->destination_io.io.kind = VS_DISK_FLUSH;
    d->source_io.done = source_flushed;
    d->destination_io.done = destination_flushed;
    if ((rc = dirty_map_init(&d->differs, capacity, region)) < 0 ||
        (rc = dirty_map_init(&d->recent, capacity, region)) < 0)
        return rc;
    rc = dirty_map_init(&d->settling, capacity, region);
    d->tracked = config->peer_tracked;
    if (rc == 0 && config->bitmap)
        load_bitmap(d, config->bitmap);
    return rc;
}

void difference_add_marker(struct difference *d, struct marker *m)
{
    list_append(&d->markers, &m->link);
}

void difference_free(struct difference *d)
{
    dirty_map_free(&d->differs);
    dirty_map_free(&d->recent);
    dirty_map_free(&d->settling);
}

void difference_mark(struct difference *d, uint64_t offset, uint64_t length)
{
    if (!d->tracked)
        return;
    dirty_map_set(&d->differs, offset, length);
    if (!destination_attached(d->rooms.destination))
        return; /* it will be copied, and then marked again */
    if (d->recent.dirty == 0 && d->step == CHECKPOINT_NONE && d->next_ns < d->rooms.host->now_ns)
        d->next_ns = d->rooms.host->now_ns + d->interval_ns;
    dirty_map_set(&d->recent, offset, length);
}

static void end_checkpoint(struct difference *d)
{
    dirty_map_clear_all(&d->settling);
    d->step = CHECKPOINT_NONE;
    d->more = false;
}

void difference_attach(struct difference *d, bool resync)
{
    assert(d->step == CHECKPOINT_NONE && d->settling.dirty == 0);
    d->tracked = true;
    if (!resync)
        dirty_map_set_all(&d->differs);
    dirty_map_clear_all(&d->recent);
    d->next_ns = d->rooms.host->now_ns + d->interval_ns;
}

void difference_detach(struct difference *d)
{
    end_checkpoint(d); /* its flushes may still be in flight: they find another epoch */
    dirty_map_clear_all(&d->recent);
}

void difference_forget(struct difference *d)
{
    difference_detach(d);
    d->tracked = false;
    dirty_map_clear_all(&d->differs);
}

void difference_hurry(struct difference *d)
{
    d->next_ns = 0;
}

void difference_pull_ahead(struct difference *d)
{
    dirty_map_add(&d->settling, &d->recent); /* a checkpoint that has begun becomes part of this one */
    dirty_map_clear_all(&d->recent);
    d->rooms.listener->mark_in_flight(d->rooms.listener);
    d->generation = d->rooms.counts->source_generation;
    d->step = CHECKPOINT_MIRRORING;
    d->word = 0;
    d->next_ns = 0;
    d->more = true; /* there may be nothing to wait for */
}

bool difference_at_rest(const struct difference *d)
{
    return d->step == CHECKPOINT_NONE && !d->flushes;
}

static bool runs(const struct difference *d)
{
    return d->rooms.state->now == VS_SYNCING || d->rooms.state->now == VS_STEADY || d->rooms.state->now == VS_AHEAD;
}

/* ---- the checkpoint ----------------------------------------------------- */

static void rotate(struct difference *d)
{
    struct dirty_map empty = d->settling;
    assert(empty.dirty == 0);
    d->settling = d->recent;
    d->recent = empty;
    d->rooms.listener->mark_in_flight(d->rooms.listener);
    list_each(node, &d->markers) {
        struct marker *m = container_of(node, struct marker, link);
        m->mark_in_flight(m);
    }
    d->generation = d->rooms.counts->source_generation;
    d->step = CHECKPOINT_MIRRORING;
    d->word = 0;
    d->next_ns = d->rooms.host->now_ns + d->interval_ns / GUEST_FLUSH_CHANCE;
}

static void flush_both(struct difference *d)
{
    d->step = CHECKPOINT_FLUSHING;
    d->flushes = 2;
    d->flush_failed = false;
    d->epoch = d->rooms.destination->epoch;
    d->source_generation = d->rooms.counts->source_generation;
    d->destination_prefix = d->rooms.counts->mirrored_known ? d->rooms.counts->writes_mirrored : 0;
    disk_submit(d->rooms.source->disk, &d->source_io);
    destination_submit(d->rooms.destination, &d->destination_io);
}

static void flushed(struct difference *d, bool failed)
{
    d->flushes--;
    d->flush_failed |= failed;
    durability_recheck(d->rooms.state);
    if (d->flushes > 0 || d->step != CHECKPOINT_FLUSHING || d->epoch != d->rooms.destination->epoch)
        return;
    if (d->flush_failed) {
        dirty_map_add(&d->recent, &d->settling);
        end_checkpoint(d);
        d->next_ns = d->rooms.host->now_ns + d->interval_ns;
        return;
    }
    d->step = CHECKPOINT_SETTLING;
}

static void source_flushed(struct disk_io *io)
{
    struct difference *d = container_of(io, struct difference, source_io);
    if (io->result < 0)
        report_io_error(d->rooms.mailbox, VS_SOURCE, io);
    else if (d->epoch == d->rooms.destination->epoch)
        counts_source_flushed(d->rooms.counts, d->source_generation);
    flushed(d, io->result < 0);
}

static void destination_flushed(struct destination_io *io, bool current)
{
    struct difference *d = container_of(io, struct difference, destination_io);
    if (current && d->rooms.counts->mirrored_known)
        counts_destination_flushed(d->rooms.counts, d->destination_prefix);
    flushed(d, io->io.result < 0);
}

static bool region_is_kept(const struct difference *d, uint64_t region)
{
    const struct dirty_map *m = &d->settling;
    uint64_t offset = region << m->region_shift, length = 1ull << m->region_shift;
    if (offset + length > m->capacity_bytes)
        length = m->capacity_bytes - offset;
    return dirty_map_any_dirty(&d->rooms.uncopied->regions, offset, length) ||
           bad_ranges_overlap(d->rooms.bad, offset, length);
}

static void settle(struct difference *d)
{
    bool look = d->rooms.uncopied->regions.dirty || bad_ranges_any(d->rooms.bad);
    for (unsigned n = 0; n < SETTLE_WORDS; n++) {
        uint64_t clean;
        d->word = dirty_map_next_word(&d->settling, d->word);
        if (d->word == UINT64_MAX) {
            end_checkpoint(d);
            d->next_ns = d->rooms.host->now_ns + d->interval_ns;
            return;
        }
        clean = d->settling.words[d->word] & ~d->recent.words[d->word];
        for (uint64_t left = look ? clean : 0; left; left &= left - 1)
            if (region_is_kept(d, d->word * 64 + (uint64_t)__builtin_ctzll(left)))
                clean &= ~(left & -left);
        dirty_map_clear_bits(&d->differs, d->word, clean);
        dirty_map_clear_bits(&d->settling, d->word, ~0ull);
    }
    d->more = true;
}

/* A time for the next checkpoint to begin. */
static bool begins(const struct difference *d)
{
    return d->step == CHECKPOINT_NONE && d->recent.dirty && !d->flushes && d->rooms.state->now != VS_AHEAD;
}

/* The one that begins with ahead covers all that was on its way then, a repair too. */
static bool held_up(const struct difference *d)
{
    return d->rooms.state->now == VS_AHEAD &&
           (d->flushes || d->rooms.uncopied->in_flight || d->rooms.destination->disk->stats.in_flight);
}

static bool counts_cover(const struct difference *d)
{
    return d->rooms.state->now == VS_STEADY && !d->rooms.uncopied->growing &&
           d->rooms.counts->writes_flushed >= d->generation && counts_source_holds(d->rooms.counts, d->generation);
}

void difference_pump(struct difference *d)
{
    d->more = false;
    if (!d->tracked || !runs(d))
        return;
    if (begins(d) && d->rooms.host->now_ns >= d->next_ns)
        rotate(d);
    if (d->step == CHECKPOINT_MIRRORING && !held_up(d)) {
        if (counts_cover(d))
            d->step = CHECKPOINT_SETTLING;
        else if (guest_is_taken_up(d->rooms.load) && d->rooms.host->now_ns >= d->next_ns &&
                 log_mirrored_prefix(d->rooms.log, d->rooms.counts->source_generation) >= d->generation)
            flush_both(d);
    }
    if (d->step == CHECKPOINT_SETTLING)
        settle(d);
}

uint64_t difference_deadline_ns(const struct difference *d)
{
    bool waits = begins(d) || (d->step == CHECKPOINT_MIRRORING && guest_is_taken_up(d->rooms.load) &&
                               d->next_ns > d->rooms.host->now_ns);
    return d->tracked && runs(d) && waits ? d->next_ns : UINT64_MAX;
}
