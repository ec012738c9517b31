/* SPDX-License-Identifier: Apache-2.0
 *
 * Answers a guest's read from the destination when the source could not read it.
 *
 * When the destination's answer is right: a read that fails on the source may see any state from its submission on.
 * The destination holds the guest's writes 1 .. M. So G is sampled after the failure, and once M has reached it, the
 * destination shows such a state. What is written there meanwhile is younger, and in flight together with the read.
 *
 * When it is not used:
 *   - where the source is in doubt or unreadable: there the two disks are known to differ, or the guest was told that a
 *     write had failed;
 *   - after a verification has found that the disks differ, wherever that is;
 *   - outside of steady. When steady ends, whoever still waits gets the source's error.
 *
 * The destination is read into buffers of our own. A request that has waited for destination_timeout is answered with
 * the error, and what a hanging destination writes late goes into memory that nobody looks at (rules 7, 8).
 */
#include "read_fallback.h"

#include <errno.h>

#include "attachment.h"
#include "guest.h"
#include "request.h"

static void destination_read(struct destination_io *io, bool current);

int read_fallback_init(struct guest *g)
{
    struct read_fallback *f = &g->read_fallback;
    list_init(&f->waiting);
    for (unsigned i = 0; i < FALLBACK_DEPTH; i++)
        f->reads[i].guest = g;
    return ring_alloc_init(&f->buffers, BOUNCE_BYTES, LOG_UNIT_BYTES, FALLBACK_DEPTH);
}

void read_fallback_free(struct guest *g)
{
    ring_alloc_free(&g->read_fallback.buffers);
}

static bool trusted(const struct guest *g, const struct request *r)
{
    return g->mirror->state.now == VS_STEADY && !g->mirror->state.differs &&
           !bad_ranges_overlap(&g->mirror->bad, r->blk.offset, r->blk.length);
}

bool read_fallback_take(struct request *r, int error)
{
    struct guest *g = r->guest;
    if (!g->config->read_fallback || !error_is_of_disk(error) || !trusted(g, r))
        return false;
    r->generation = g->mirror->counts.source_generation;
    r->waits_since_ns = g->host->now_ns;
    list_append(&g->read_fallback.waiting, &r->link);
    return true;
}

static void tell(struct guest *g, const struct request *r)
{
    struct vs_event event = {
        .kind = VS_EV_READ_FALLBACK, .offset = r->blk.offset, .length = r->blk.length, .disk_role = VS_DESTINATION};
    if (g->read_fallback.told_epoch == g->mirror->destination.epoch)
        return;
    g->read_fallback.told_epoch = g->mirror->destination.epoch;
    mailbox_post(g->mailbox, &event);
}

static void destination_read(struct destination_io *io, bool current)
{
    struct fallback_read *p = container_of(io, struct fallback_read, io);
    struct guest *g = p->guest;
    struct request *r = p->request;
    (void)current; /* a request that did not wait for its answer is answered */
    if (r && io->io.result == 0 && trusted(g, r)) {
        g->read_fallback.answered++;
        tell(g, r);
        request_answer_read(r, p->buffer);
    } else if (r) {
        request_answer_read(r, NULL);
    }
    ring_give(&g->read_fallback.buffers, p->slot);
    p->request = NULL;
    p->in_use = false;
    g->read_fallback.in_use--;
}

static struct fallback_read *free_read(struct read_fallback *f)
{
    for (unsigned i = 0; i < FALLBACK_DEPTH; i++)
        if (!f->reads[i].in_use)
            return &f->reads[i];
    return NULL;
}

/* False: there is no room now. */
static bool read_destination(struct guest *g, struct request *r)
{
    struct read_fallback *f = &g->read_fallback;
    struct fallback_read *p = free_read(f);
    if (!p || (p->slot = ring_take(&f->buffers, r->blk.length, &p->buffer)) < 0)
        return false;
    list_remove(&r->link);
    f->in_use++;
    p->in_use = true;
    p->request = r;
    p->iov = (struct iovec){p->buffer, (size_t)r->blk.length};
    p->io.io.kind = VS_DISK_READ;
    p->io.io.offset = r->blk.offset;
    p->io.io.length = r->blk.length;
    p->io.io.iov = &p->iov;
    p->io.io.iov_count = 1;
    p->io.done = destination_read;
    destination_submit(&g->mirror->destination, &p->io);
    return true;
}

static void answer_with_error(struct request *r)
{
    list_remove(&r->link);
    request_answer_read(r, NULL);
}

/* Those at a destination that was given up. */
static void leave_destination(struct read_fallback *f)
{
    for (unsigned i = 0; f->in_use && i < FALLBACK_DEPTH; i++) {
        struct request *r = f->reads[i].request;
        f->reads[i].request = NULL;
        if (r)
            request_answer_read(r, NULL);
    }
}

static uint64_t patience_ns(const struct guest *g)
{
    return g->config->destination_timeout_us * 1000;
}

void read_fallback_pump(struct guest *g)
{
    struct read_fallback *f = &g->read_fallback;
    if (g->mirror->state.now != VS_STEADY)
        leave_destination(f);
    list_each_safe(node, &f->waiting) {
        struct request *r = container_of(node, struct request, link);
        if (!trusted(g, r) || g->host->now_ns >= r->waits_since_ns + patience_ns(g))
            answer_with_error(r);
        else if (g->mirror->counts.writes_mirrored >= r->generation && !read_destination(g, r))
            return;
    }
}

bool read_fallback_due(const struct guest *g)
{
    const struct read_fallback *f = &g->read_fallback;
    if (g->mirror->state.now == VS_STEADY)
        return false;
    for (unsigned i = 0; f->in_use && i < FALLBACK_DEPTH; i++)
        if (f->reads[i].request)
            return true;
    return !list_empty(&f->waiting);
}

uint64_t read_fallback_deadline_ns(const struct guest *g)
{
    const struct read_fallback *f = &g->read_fallback;
    if (list_empty(&f->waiting))
        return UINT64_MAX;
    return container_of(f->waiting.next, struct request, link)->waits_since_ns + patience_ns(g);
}

bool read_fallback_waits(const struct guest *g, const struct queue *q)
{
    const struct read_fallback *f = &g->read_fallback;
    list_each(node, &f->waiting) {
        if (container_of(node, struct request, link)->queue == q)
            return true;
    }
    for (unsigned i = 0; f->in_use && i < FALLBACK_DEPTH; i++)
        if (f->reads[i].request && f->reads[i].request->queue == q)
            return true;
    return false;
}
