/* SPDX-License-Identifier: Apache-2.0
 *
 * Growing the disk, the mirror kept:
 *   1. The maps become larger, and so does what the bitmap's file stands for (the
 *      control plane has made the file long enough). The new range may differ
 *      between the disks, so all its regions are marked (rule 4).
 *   2. With a destination, the copier copies the new range to it, in the one order
 *      (rule 3), while the mirror stays steady for the old one: of the region
 *      across the old end it copies the new part alone, and every write of the
 *      guest's is replicated, there too (replicator.c). Then the
 *      destination is flushed: what the guest has never written is durable there
 *      too, and a flush with R <= F stays true.
 *   3. Only now is the capacity raised: a request beyond the old end was refused
 *      until then. The guest is told by the control plane.
 * A destination that is lost on the way ends 2; the bits say what it lacks.
 * Until 3 it can be stopped, and a source that cannot be read there stops it: then
 * the disk stays as large as it is, and what was copied beyond its end is nobody's.
 */
#include "grow.h"

#include <errno.h>

#include "activity_log.h"
#include "bitmap_file.h"
#include "difference.h"
#include "guest_side.h"
#include "mailbox.h"
#include "mirror_state.h"
#include "source.h"
#include "uncopied.h"

static void new_range_unreadable(struct copy_of_growth *copy, int error)
{
    grow_stop(container_of(copy, struct grow, copy), error);
}

void grow_init(struct grow *g, const struct grow_rooms *rooms)
{
    *g = (struct grow){.rooms = *rooms, .copy.unreadable = new_range_unreadable};
}

static int refusal(const struct grow *g, const struct vs_grow *wanted)
{
    enum vs_mirror_state state = g->rooms.state->now;
    if (g->running || g->undoing || g->rooms.load->holds ||
        (state != VS_PASSTHROUGH && state != VS_DEGRADED && state != VS_STEADY))
        return -EBUSY;
    if (wanted->capacity_bytes <= g->rooms.source->capacity_bytes ||
        wanted->capacity_bytes % g->rooms.source->block_bytes)
        return -EINVAL;
    if (wanted->source_bytes < wanted->capacity_bytes ||
        (destination_attached(g->rooms.destination) && wanted->destination_bytes < wanted->capacity_bytes))
        return -ENOSPC;
    return 0;
}

/* The bitmap's file stays as long as it has become: a later growth may need less of it. */
static int grow_maps(struct grow *g, uint64_t capacity_bytes)
{
    struct difference *d = g->rooms.difference;
    struct vs_bitmap *bitmap = g->rooms.activity->bitmap;
    int rc;
    if (bitmap && capacity_bytes > bitmap->shape.capacity_bytes &&
        ((rc = activity_grow(g->rooms.activity, capacity_bytes)) < 0 || (rc = bitmap_grow(bitmap, capacity_bytes)) < 0))
        return rc;
    if ((rc = dirty_map_grow(&g->rooms.uncopied->regions, capacity_bytes)) < 0 ||
        (rc = dirty_map_grow(&d->recent, capacity_bytes)) < 0 ||
        (rc = dirty_map_grow(&d->settling, capacity_bytes)) < 0)
        return rc;
    return dirty_map_grow(&d->differs, capacity_bytes);
}

/* What would not fit the disk is not to be copied to the next destination, nor to be asked of it. */
static void shrink_maps(struct grow *g)
{
    struct difference *d = g->rooms.difference;
    struct dirty_map *maps[] = {&g->rooms.uncopied->regions, &d->recent, &d->settling, &d->differs};
    for (size_t i = 0; i < sizeof maps / sizeof maps[0]; i++)
        dirty_map_shrink(maps[i], g->rooms.source->capacity_bytes);
}

static void end_growth(struct grow *g)
{
    g->running = g->rooms.uncopied->growing = false;
    g->rooms.source->capacity_bytes = *g->rooms.request_limit_bytes = g->capacity_bytes;
    mailbox_done(g->rooms.mailbox, g->token, 0, 0);
}

static void measured(struct disk_io *io)
{
    struct size_question *q = container_of(io, struct size_question, io);
    q->asked = false;
    mailbox_done(q->mailbox, q->token, io->result, io->result < 0 ? 0 : io->size_bytes);
}

void grow_measure(struct grow *g, uint64_t token, uint64_t role)
{
    struct vs_disk *disk = role == VS_SOURCE ? g->rooms.source->disk : g->rooms.destination->disk;
    struct size_question *q = &g->size_question[role != VS_SOURCE];
    if (!disk || q->asked) {
        mailbox_done(g->rooms.mailbox, token, disk ? -EBUSY : -ENOTCONN, 0);
        return;
    }
    *q = (struct size_question){.mailbox = g->rooms.mailbox, .token = token, .asked = true};
    q->io.kind = VS_DISK_SIZE;
    q->io.done = measured;
    disk_submit(disk, &q->io);
}

void grow_begin(struct grow *g, uint64_t token, const struct vs_grow *wanted)
{
    uint64_t old = g->rooms.source->capacity_bytes, capacity_bytes = wanted->capacity_bytes;
    int rc = refusal(g, wanted);
    if (rc == 0)
        rc = grow_maps(g, capacity_bytes);
    if (rc == -ENOMEM)
        shrink_maps(g);
    if (rc < 0) {
        mailbox_done(g->rooms.mailbox, token, rc, 0);
        return;
    }
    g->rooms.host->changes++; /* the operator has enlarged the files */
    g->token = token;
    g->capacity_bytes = capacity_bytes;
    g->rooms.source->disk->bytes = wanted->source_bytes;
    difference_mark(g->rooms.difference, old, capacity_bytes - old);
    g->running = true;
    if (!destination_attached(g->rooms.destination))
        return; /* the rest is grow_pump()'s */
    g->rooms.destination->disk->bytes = wanted->destination_bytes;
    copier_add(g->rooms.copier, old, capacity_bytes - old, &g->copy);
}

static void flushed(struct destination_io *io, bool current)
{
    struct grow *g = container_of(io, struct grow, flush);
    g->flushing = false;
    if (g->running && current) /* not stopped; and if it is lost, grow_pump() finds that */
        end_growth(g);
}

/* Once nothing is under way that lies beyond the end; whoever has stopped it does not wait for that. */
static void undo(struct grow *g)
{
    if (g->flushing || g->rooms.uncopied->in_flight)
        return;
    if (g->rooms.state->now == VS_STEADY)
        dirty_map_clear_all(&g->rooms.uncopied->regions); /* nothing else is copied in steady */
    shrink_maps(g);
    g->undoing = false;
}

void grow_stop(struct grow *g, int error)
{
    if (!g->running)
        return;
    g->running = g->rooms.uncopied->growing = false;
    g->undoing = true;
    undo(g);
    mailbox_done(g->rooms.mailbox, g->token, error, 0);
}

void grow_pump(struct grow *g)
{
    if (g->undoing)
        undo(g);
    /* Once it is answered the bitmap's file is told the new size; it must not be believed without the bits of 1. */
    if (!g->running || g->flushing || !activity_tracks(g->rooms.activity))
        return;
    if (g->rooms.state->now != VS_STEADY) {
        end_growth(g);
        return;
    }
    if (!uncopied_is_empty(g->rooms.uncopied))
        return;
    g->flushing = true;
    g->flush.io.kind = VS_DISK_FLUSH;
    g->flush.done = flushed;
    destination_submit(g->rooms.destination, &g->flush);
}
