/* SPDX-License-Identifier: Apache-2.0
 *
 * Asks a disk, ahead of the copy, where it has data and where holes. See copy_scout.h.
 */
#include "copy_scout.h"

static void scouted(struct disk_io *io)
{
    struct copy_scout *s = container_of(io, struct copy_scout, io);
    s->asking = false;
    if (s->epoch == s->destination->epoch) /* else it was another disk's answer */
        copy_scout_learn(s, io);
}

void copy_scout_init(struct copy_scout *s, const struct destination *destination)
{
    s->destination = destination;
    s->io.kind = VS_DISK_EXTENTS;
    s->io.to_data_end = true;
    s->io.done = scouted;
}

void copy_scout_forget(struct copy_scout *s)
{
    s->from = s->end = 0;
}

void copy_scout_learn(struct copy_scout *s, const struct disk_io *found)
{
    s->hole = found->data_at > found->offset;
    s->from = found->offset;
    s->end = s->hole ? found->data_at : found->data_end;
}

bool copy_scout_knows(struct copy_scout *s, struct vs_disk *disk, uint64_t offset, uint64_t end)
{
    if (s->asking)
        return false;
    if (s->epoch == s->destination->epoch && offset >= s->from && offset < s->end)
        return true;
    s->asking = true;
    s->epoch = s->destination->epoch;
    s->io.offset = offset;
    s->io.length = end - offset;
    disk_submit(disk, &s->io);
    return false;
}
