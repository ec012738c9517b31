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

#include "attachment.h"
#include "bitmap_file.h"
#include "engine.h"

static int check(const struct vs_engine *e, const struct vs_grow *wanted)
{
    enum vs_mirror_state state = e->mirror.state;
    if (e->grow.running || e->grow.undoing || e->gate != GATE_OPEN || e->failover.pending || (state != VS_PASSTHROUGH && state != VS_DEGRADED && state != VS_STEADY))
        return -EBUSY;
    if (wanted->capacity_bytes <= e->config.capacity_bytes || wanted->capacity_bytes % e->config.block_bytes)
        return -EINVAL;
    if (wanted->source_bytes < wanted->capacity_bytes || (destination_attached(&e->destination) && wanted->destination_bytes < wanted->capacity_bytes))
        return -ENOSPC;
    return 0;
}

/* The bitmap's file stays as long as it has become: a later growth may need less of it. */
static int grow_maps(struct vs_engine *e, uint64_t capacity_bytes)
{
    struct difference *d = &e->difference;
    struct vs_bitmap *bitmap = e->activity.bitmap;
    int rc;
    if (bitmap && capacity_bytes > bitmap->shape.capacity_bytes && ((rc = activity_grow(&e->activity, capacity_bytes)) < 0 ||
                               (rc = bitmap_grow(bitmap, capacity_bytes)) < 0))
        return rc;
    if ((rc = dirty_map_grow(&e->to_copy, capacity_bytes)) < 0 || (rc = dirty_map_grow(&d->recent, capacity_bytes)) < 0 ||
        (rc = dirty_map_grow(&d->settling, capacity_bytes)) < 0)
        return rc;
    return dirty_map_grow(&d->differs, capacity_bytes);
}

/* What would not fit the disk is not to be copied to the next destination, nor to be asked of it. */
static void shrink_maps(struct vs_engine *e)
{
    struct difference *d = &e->difference;
    struct dirty_map *maps[] = {&e->to_copy, &d->recent, &d->settling, &d->differs};
    for (size_t i = 0; i < sizeof maps / sizeof maps[0]; i++)
        dirty_map_shrink(maps[i], e->config.capacity_bytes);
}

static void finish(struct vs_engine *e)
{
    e->grow.running = false;
    e->config.capacity_bytes = e->limits.capacity_bytes = e->grow.capacity_bytes;
    mailbox_done(&e->mailbox, e->grow.token, 0, 0);
}

static void measured(struct disk_io *io)
{
    struct size_question *q = container_of(io, struct size_question, io);
    q->asked = false;
    mailbox_done(&q->engine->mailbox, q->token, io->result, io->result < 0 ? 0 : io->size_bytes);
}

void grow_measure(struct vs_engine *e, uint64_t token, uint64_t role)
{
    struct vs_disk *disk = role == VS_SOURCE ? e->source : e->destination.disk;
    struct size_question *q = &e->grow.size_question[role != VS_SOURCE];
    if (!disk || q->asked) {
        mailbox_done(&e->mailbox, token, disk ? -EBUSY : -ENOTCONN, 0);
        return;
    }
    *q = (struct size_question){.engine = e, .token = token, .asked = true};
    q->io.kind = VS_DISK_SIZE;
    q->io.done = measured;
    disk_submit(disk, &q->io);
}

void grow_begin(struct vs_engine *e, uint64_t token, const struct vs_grow *wanted)
{
    uint64_t old = e->config.capacity_bytes, capacity_bytes = wanted->capacity_bytes;
    int rc = check(e, wanted);
    if (rc == 0)
        rc = grow_maps(e, capacity_bytes);
    if (rc == -ENOMEM)
        shrink_maps(e);
    if (rc < 0) {
        mailbox_done(&e->mailbox, token, rc, 0);
        return;
    }
    e->host.changes++; /* the operator has enlarged the files */
    e->grow.token = token;
    e->grow.capacity_bytes = capacity_bytes;
    e->source->bytes = wanted->source_bytes;
    difference_mark(e, old, capacity_bytes - old);
    e->grow.running = true;
    if (!destination_attached(&e->destination))
        return; /* the rest is grow_pump()'s */
    e->destination.disk->bytes = wanted->destination_bytes;
    copier_add(e, old, capacity_bytes - old);
}

static void flushed(struct destination_io *io, bool current)
{
    struct vs_engine *e = container_of(io, struct vs_engine, grow.flush);
    e->grow.flushing = false;
    if (e->grow.running && current) /* not stopped; and if it is lost, grow_pump() finds that */
        finish(e);
}

/* Once nothing is under way that lies beyond the end; whoever has stopped it does not wait for that. */
static void undo(struct vs_engine *e)
{
    if (e->grow.flushing || e->copier.in_use)
        return;
    if (e->mirror.state == VS_STEADY)
        dirty_map_clear_all(&e->to_copy); /* nothing else is copied in steady */
    shrink_maps(e);
    e->grow.undoing = false;
}

void grow_stop(struct vs_engine *e, int error)
{
    if (!e->grow.running)
        return;
    e->grow.running = false;
    e->grow.undoing = true;
    undo(e);
    mailbox_done(&e->mailbox, e->grow.token, error, 0);
}

void grow_pump(struct vs_engine *e)
{
    struct grow *g = &e->grow;
    if (g->undoing)
        undo(e);
    /* Once it is answered the bitmap's file is told the new size; it must not be believed without the bits of 1. */
    if (!g->running || g->flushing || !activity_tracks(&e->activity))
        return;
    if (e->mirror.state != VS_STEADY) {
        finish(e);
        return;
    }
    if (!copier_finished(e))
        return;
    g->flushing = true;
    g->flush.io.kind = VS_DISK_FLUSH;
    g->flush.done = flushed;
    destination_submit(&e->destination, &g->flush);
}
