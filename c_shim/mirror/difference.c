/* SPDX-License-Identifier: Apache-2.0
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

#include "attachment.h"
#include "bitmap_file.h"
#include "engine.h"
#include "request_path.h"

/* A guest that flushes by itself makes our own flushes needless: that part of the interval is waited for it. */
#define GUEST_FLUSH_CHANCE 6
#define SETTLE_WORDS 4096u

static void source_flushed(struct disk_io *io);
static void destination_flushed(struct destination_io *io, bool current);

static uint64_t interval_ns(const struct vs_engine *e)
{
    return e->config.checkpoint_us * 1000;
}

/* The map as an earlier process has left it, if there was a peer; and the file follows it from here on. */
static void load_bitmap(struct vs_engine *e)
{
    struct difference *d = &e->difference;
    d->tracked = e->config.peer_tracked;
    if (d->tracked)
        bitmap_load(e->config.bitmap, &d->differs);
    d->differs.stored = bitmap_store;
    d->differs.keeper = e->config.bitmap;
}

int difference_init(struct vs_engine *e)
{
    struct difference *d = &e->difference;
    uint64_t capacity = e->config.capacity_bytes;
    uint32_t region = e->config.dirty_region_bytes;
    int rc;
    d->source_io.kind = d->destination_io.io.kind = VS_DISK_FLUSH;
    d->source_io.done = source_flushed;
    d->destination_io.done = destination_flushed;
    if ((rc = dirty_map_init(&d->differs, capacity, region)) < 0 ||
        (rc = dirty_map_init(&d->recent, capacity, region)) < 0)
        return rc;
    rc = dirty_map_init(&d->settling, capacity, region);
    if (rc == 0 && e->config.bitmap)
        load_bitmap(e);
    return rc;
}

void difference_free(struct vs_engine *e)
{
    dirty_map_free(&e->difference.differs);
    dirty_map_free(&e->difference.recent);
    dirty_map_free(&e->difference.settling);
}

void difference_mark(struct vs_engine *e, uint64_t offset, uint64_t length)
{
    struct difference *d = &e->difference;
    if (!d->tracked)
        return;
    dirty_map_set(&d->differs, offset, length);
    if (!destination_attached(&e->destination))
        return; /* it will be copied, and then marked again */
    if (d->recent.dirty == 0 && d->step == CHECKPOINT_NONE && d->next_ns < engine_now(e))
        d->next_ns = engine_now(e) + interval_ns(e);
    dirty_map_set(&d->recent, offset, length);
}

static void end_checkpoint(struct difference *d)
{
    dirty_map_clear_all(&d->settling);
    d->step = CHECKPOINT_NONE;
    d->more = false;
}

void difference_attach(struct vs_engine *e, bool resync)
{
    struct difference *d = &e->difference;
    assert(d->step == CHECKPOINT_NONE && d->settling.dirty == 0);
    d->tracked = true;
    if (!resync)
        dirty_map_set_all(&d->differs);
    dirty_map_clear_all(&d->recent);
    d->next_ns = engine_now(e) + interval_ns(e);
}

void difference_detach(struct vs_engine *e)
{
    end_checkpoint(&e->difference); /* its flushes may still be in flight: they find another epoch */
    dirty_map_clear_all(&e->difference.recent);
}

void difference_forget(struct vs_engine *e)
{
    difference_detach(e);
    e->difference.tracked = false;
    dirty_map_clear_all(&e->difference.differs);
}

void difference_hurry(struct vs_engine *e)
{
    e->difference.next_ns = 0;
}

void difference_pull_ahead(struct vs_engine *e)
{
    struct difference *d = &e->difference;
    dirty_map_add(&d->settling, &d->recent); /* a checkpoint that has begun becomes part of this one */
    dirty_map_clear_all(&d->recent);
    request_path_mark_in_flight(e);
    d->generation = e->counts.source_generation;
    d->step = CHECKPOINT_MIRRORING;
    d->word = 0;
    d->next_ns = 0;
    d->more = true; /* there may be nothing to wait for */
}

bool difference_at_rest(const struct vs_engine *e)
{
    return e->difference.step == CHECKPOINT_NONE && !e->difference.flushes;
}

static bool runs(const struct vs_engine *e)
{
    return e->mirror.state == VS_SYNCING || e->mirror.state == VS_STEADY || e->mirror.state == VS_AHEAD;
}

/* ---- the checkpoint ----------------------------------------------------- */

static void rotate(struct vs_engine *e)
{
    struct difference *d = &e->difference;
    struct dirty_map empty = d->settling;
    assert(empty.dirty == 0);
    d->settling = d->recent;
    d->recent = empty;
    request_path_mark_in_flight(e);
    copier_mark_in_flight(e);
    verifier_mark_in_flight(e);
    d->generation = e->counts.source_generation;
    d->step = CHECKPOINT_MIRRORING;
    d->word = 0;
    d->next_ns = engine_now(e) + interval_ns(e) / GUEST_FLUSH_CHANCE;
}

static void flush_both(struct vs_engine *e)
{
    struct difference *d = &e->difference;
    d->step = CHECKPOINT_FLUSHING;
    d->flushes = 2;
    d->flush_failed = false;
    d->epoch = e->destination.epoch;
    d->source_generation = e->counts.source_generation;
    d->destination_prefix = e->counts.mirrored_known ? e->counts.writes_mirrored : 0;
    disk_submit(e->source, &d->source_io);
    destination_submit(&e->destination, &d->destination_io);
}

static void flushed(struct vs_engine *e, bool failed)
{
    struct difference *d = &e->difference;
    d->flushes--;
    d->flush_failed |= failed;
    e->flush.dirty = true;
    if (d->flushes > 0 || d->step != CHECKPOINT_FLUSHING || d->epoch != e->destination.epoch)
        return;
    if (d->flush_failed) {
        dirty_map_add(&d->recent, &d->settling);
        end_checkpoint(d);
        d->next_ns = engine_now(e) + interval_ns(e);
        return;
    }
    d->step = CHECKPOINT_SETTLING;
}

static void source_flushed(struct disk_io *io)
{
    struct vs_engine *e = container_of(io, struct vs_engine, difference.source_io);
    if (io->result < 0)
        report_io_error(&e->mailbox, VS_SOURCE, io);
    else if (e->difference.epoch == e->destination.epoch)
        counts_source_flushed(&e->counts, e->difference.source_generation);
    flushed(e, io->result < 0);
}

static void destination_flushed(struct destination_io *io, bool current)
{
    struct vs_engine *e = container_of(io, struct vs_engine, difference.destination_io);
    if (current && e->counts.mirrored_known)
        counts_destination_flushed(&e->counts, e->difference.destination_prefix);
    flushed(e, io->io.result < 0);
}

static bool region_is_kept(const struct vs_engine *e, uint64_t region)
{
    const struct dirty_map *m = &e->difference.settling;
    uint64_t offset = region << m->region_shift, length = 1ull << m->region_shift;
    if (offset + length > m->capacity_bytes)
        length = m->capacity_bytes - offset;
    return dirty_map_any_dirty(&e->to_copy, offset, length) || bad_ranges_overlap(&e->bad, offset, length);
}

static void settle(struct vs_engine *e)
{
    struct difference *d = &e->difference;
    bool look = e->to_copy.dirty || bad_ranges_any(&e->bad);
    for (unsigned n = 0; n < SETTLE_WORDS; n++) {
        uint64_t clean;
        d->word = dirty_map_next_word(&d->settling, d->word);
        if (d->word == UINT64_MAX) {
            end_checkpoint(d);
            d->next_ns = engine_now(e) + interval_ns(e);
            return;
        }
        clean = d->settling.words[d->word] & ~d->recent.words[d->word];
        for (uint64_t left = look ? clean : 0; left; left &= left - 1)
            if (region_is_kept(e, d->word * 64 + (uint64_t)__builtin_ctzll(left)))
                clean &= ~(left & -left);
        dirty_map_clear_bits(&d->differs, d->word, clean);
        dirty_map_clear_bits(&d->settling, d->word, ~0ull);
    }
    d->more = true;
}

/* A time for the next checkpoint to begin. */
static bool begins(const struct vs_engine *e)
{
    const struct difference *d = &e->difference;
    return d->step == CHECKPOINT_NONE && d->recent.dirty && !d->flushes && e->mirror.state != VS_AHEAD;
}

/* The one that begins with ahead covers all that was on its way then, a repair too. */
static bool held_up(const struct vs_engine *e)
{
    return e->mirror.state == VS_AHEAD && (e->difference.flushes || e->copier.in_use || e->destination.disk->stats.in_flight);
}

static bool counts_cover(const struct vs_engine *e)
{
    return e->mirror.state == VS_STEADY && !e->grow.running && e->counts.writes_flushed >= e->difference.generation &&
           counts_source_holds(&e->counts, e->difference.generation);
}

void difference_pump(struct vs_engine *e)
{
    struct difference *d = &e->difference;
    d->more = false;
    if (!d->tracked || !runs(e))
        return;
    if (begins(e) && engine_now(e) >= d->next_ns)
        rotate(e);
    if (d->step == CHECKPOINT_MIRRORING && !held_up(e)) {
        if (counts_cover(e))
            d->step = CHECKPOINT_SETTLING;
        else if (engine_takes_up(e) && engine_now(e) >= d->next_ns &&
                 log_mirrored_prefix(&e->log, e->counts.source_generation) >= d->generation)
            flush_both(e);
    }
    if (d->step == CHECKPOINT_SETTLING)
        settle(e);
}

uint64_t difference_deadline_ns(const struct vs_engine *e)
{
    const struct difference *d = &e->difference;
    bool waits = begins(e) || (d->step == CHECKPOINT_MIRRORING && engine_takes_up(e) && d->next_ns > engine_now(e));
    return d->tracked && runs(e) && waits ? d->next_ns : UINT64_MAX;
}
