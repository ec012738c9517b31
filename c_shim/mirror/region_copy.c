/* SPDX-License-Identifier: Apache-2.0
 *
 * What the steps of a region copy have in common: they ask a disk, give way to the guest, and end. See region_copy.h
 * for the struct, and copier.c for the steps.
 */
#include "region_copy.h"

#include "clock.h"
#include "guest_flush.h"
#include "guest_side.h"
#include "mirror_state.h"
#include "own_memory.h"
#include "source.h"
#include "uncopied.h"

bool copy_yields(const struct copier *k)
{
    const struct copier_rooms *r = &k->rooms;
    unsigned held = guest_flush_paused(r->flush, NULL); /* a pause: they wait for this very copy */
    return r->flush->waiting > held || r->load->in_flight > held || guest_took_up_lately(r->load, r->host->now_ns);
}

void copy_counts_as(struct copier *k, uint64_t bytes)
{
    k->not_before_ns = clock_pace_ns(k->not_before_ns, k->rooms.host->now_ns, bytes, k->speed_bytes_per_s);
}

bool copy_is_current(const struct region_copy *c)
{
    return c->epoch == c->copier->rooms.destination->epoch;
}

static uint64_t round_now(const struct copier *k)
{
    return copy_yields(k) ? k->pace.round : 0;
}

void copy_ask_source(struct region_copy *c, void (*done)(struct disk_io *io))
{
    c->pace_round = round_now(c->copier);
    c->io.io.done = done;
    disk_submit(c->copier->rooms.source->disk, &c->io.io);
}

void copy_ask_destination(struct region_copy *c, void (*done)(struct destination_io *io, bool current))
{
    c->pace_round = round_now(c->copier);
    c->io.done = done;
    destination_submit(c->copier->rooms.destination, &c->io);
}

void copy_took(struct region_copy *c, enum copy_disk disk)
{
    uint64_t now = c->copier->rooms.host->now_ns;
    copy_pace_completed(&c->copier->pace, disk, c->pace_round, disk_io_age_ns(&c->io.io, now), now);
}

void copy_end(struct region_copy *c)
{
    struct uncopied *u = c->copier->rooms.uncopied;
    c->step = COPY_FREE;
    u->in_flight--;
    if (uncopied_is_empty(u)) /* the buffers are not needed for long */
        own_memory_drop(c->copier->buffers, COPY_BUFFERS_BYTES);
}

void copy_done(struct region_copy *c)
{
    struct copier *k = c->copier;
    range_release(&k->rooms.destination->slots, &c->slot);
    k->bytes_done += c->length;
    k->bytes_sparse += c->sparse;
    copy_end(c);
}

void copy_displace(struct region_copy *c)
{
    struct copier *k = c->copier;
    range_release(&k->rooms.destination->slots, &c->slot);
    dirty_map_set(&k->rooms.uncopied->regions, c->offset, c->length);
    k->cursor = c->offset;
    copy_end(c);
}
