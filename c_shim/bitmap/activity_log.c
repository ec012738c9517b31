/* SPDX-License-Identifier: Apache-2.0
 *
 * The activity log: names, durably and in advance, the extents that the guest writes to (activity_log.h).
 *
 * Invariant: a write reaches the source only while every extent that it touches
 * is named by the newest whole copy of the log that is durable. So after a host
 * crash, whatever differs is in the durable bits or in a named extent.
 *
 *   - An extent comes in by a transaction: the other copy of the log, with the
 *     extent in it and the next sequence number, is written and flushed; only
 *     then do the writes that wait for it go on. Torn in between, the former
 *     copy holds, and none of them has begun.
 *   - An extent goes out, when no write is on its way in it and room is needed,
 *     only behind a flush of the bits (the kernel writes mapped pages back with
 *     it), so that those which it stood for are durable. A whole batch goes out
 *     with one such flush. A write to an extent that has just gone out waits
 *     for a later transaction, like any other.
 *   - Opening the file makes its bits durable, so the log may begin empty.
 *
 * One transaction at a time; it takes all writes that wait, in their order, as
 * far as there is room. Within the working set (extents x extent_bytes) there
 * is no transaction at all.
 *
 * If the file cannot be written, or takes no bits any more, all writes are held,
 * also those whose extents are active: the bits that they have set may be in
 * memory only, and a kill would have a restart believe the file without them.
 * Once the control plane has recorded that the bitmap is void, tracking goes on
 * in memory alone.
 */
#include "activity_log.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "activity_file.h"
#include "bitmap_file.h"
#include "mailbox.h"

/* What goes out at once where anything has to. */
#define EVICT_PART 16

static void stepped(struct uring_op *op, int result, unsigned flags);

int activity_init(struct activity *a, struct vs_bitmap *b, struct uring *uring, struct mailbox *mailbox)
{
    a->uring = uring;
    a->mailbox = mailbox;
    list_init(&a->active);
    list_init(&a->idle);
    list_init(&a->waiting);
    a->op.complete = stepped;
    if (!b)
        return 0;
    a->slots = calloc(b->slots, sizeof *a->slots);
    a->slot_of = calloc(b->shape.capacity_bytes / b->shape.extent_bytes + 1, sizeof *a->slot_of);
    a->buffer = calloc(1, b->log_bytes);
    if (!a->slots || !a->slot_of || !a->buffer)
        return -ENOMEM;
    for (uint32_t i = 0; i < b->slots; i++)
        list_append(&a->idle, &a->slots[i].link);
    a->bitmap = b;
    return 0;
}

int activity_grow(struct activity *a, uint64_t capacity_bytes)
{
    uint64_t extent = a->bitmap->shape.extent_bytes;
    uint64_t before = a->bitmap->shape.capacity_bytes / extent + 1, after = capacity_bytes / extent + 1;
    uint32_t *larger = realloc(a->slot_of, after * sizeof *larger);
    if (!larger)
        return -ENOMEM;
    memset(larger + before, 0, (after - before) * sizeof *larger);
    a->slot_of = larger;
    return 0;
}

void activity_free(struct activity *a)
{
    free(a->slots);
    free(a->slot_of);
    free(a->buffer);
}

static uint64_t first_extent(const struct activity *a, uint64_t offset)
{
    return offset / a->bitmap->shape.extent_bytes;
}

static struct active_extent *slot_of(const struct activity *a, uint64_t extent)
{
    return a->slot_of[extent] ? &a->slots[a->slot_of[extent] - 1] : NULL;
}

static void touch(struct activity *a, struct active_extent *s)
{
    list_remove(&s->link);
    list_append(&a->active, &s->link);
}

/* Goes in if all its extents are active. */
static bool try_enter(struct activity *a, uint64_t offset, uint64_t length)
{
    uint64_t first = first_extent(a, offset), last = first_extent(a, offset + length - 1);
    for (uint64_t x = first; x <= last; x++) {
        const struct active_extent *s = slot_of(a, x);
        if (!s || s->state != EXTENT_ACTIVE)
            return false;
    }
    for (uint64_t x = first; x <= last; x++) {
        slot_of(a, x)->writes++;
        touch(a, slot_of(a, x));
    }
    return true;
}

/* Its file takes bits. (A store that went nowhere has been noticed before the next instruction.) */
static bool is_sound(const struct activity *a)
{
    return !a->failed && !bitmap_lost(a->bitmap);
}

bool activity_tracks(const struct activity *a)
{
    return !a->bitmap || is_sound(a);
}

bool activity_enter(struct activity *a, struct activity_wait *w, uint64_t offset, uint64_t length)
{
    if (is_sound(a) && try_enter(a, offset, length))
        return true;
    w->offset = offset;
    w->length = length;
    list_append(&a->waiting, &w->link);
    return false;
}

void activity_leave(struct activity *a, uint64_t offset, uint64_t length)
{
    if (!a->bitmap)
        return;
    for (uint64_t x = first_extent(a, offset); x <= first_extent(a, offset + length - 1); x++) {
        struct active_extent *s = slot_of(a, x);
        assert(s && s->writes > 0);
        s->writes--;
    }
}

/* ---- a transaction --------------------------------------------------------- */

/* The least recently used that nobody writes to; NULL: there is none. */
static struct active_extent *evictable(struct activity *a)
{
    list_each(node, &a->active) {
        struct active_extent *s = container_of(node, struct active_extent, link);
        if (s->state == EXTENT_ACTIVE && s->writes == 0)
            return s;
    }
    return NULL;
}

static bool evict(struct activity *a)
{
    struct active_extent *s = evictable(a);
    if (!s)
        return false;
    a->slot_of[s->extent] = 0;
    s->state = EXTENT_FREE;
    list_remove(&s->link);
    list_append(&a->idle, &s->link);
    return true;
}

/* A slot for each extent that w lacks; false: there is no room for all of them now. */
static bool claim(struct activity *a, struct activity_wait *w, bool *evicted, bool *claimed)
{
    uint64_t first = first_extent(a, w->offset), last = first_extent(a, w->offset + w->length - 1);
    w->claimed = 0;
    for (uint64_t x = first; x <= last; x++, w->claimed++) {
        struct active_extent *s = slot_of(a, x);
        if (s) {
            s->writes++; /* what this or an earlier waiter needs does not go out; until unclaim() */
            touch(a, s);
            continue;
        }
        if (list_empty(&a->idle)) {
            if (!evict(a))
                return false;
            *evicted = true;
        }
        s = container_of(list_pop(&a->idle), struct active_extent, link);
        *s = (struct active_extent){.extent = x, .state = EXTENT_COMING, .writes = 1};
        list_append(&a->active, &s->link);
        a->slot_of[x] = (uint32_t)(s - a->slots) + 1;
        *claimed = true;
    }
    return true;
}

static void unclaim(struct activity *a, const struct activity_wait *w)
{
    for (uint64_t n = 0; n < w->claimed; n++)
        slot_of(a, first_extent(a, w->offset) + n)->writes--;
}

static void tell_sync(const struct vs_bitmap *b, bool begun)
{
    if (b->sync_seen)
        b->sync_seen(b->sync_watcher, begun);
}

static void step(struct activity *a, enum activity_step to)
{
    struct io_uring_sqe *sqe = uring_sqe(a->uring, &a->op);
    a->step = to;
    a->in_flight++;
    if (to == ACTIVITY_WRITE) {
        uint64_t offset = bitmap_log_offset(a->bitmap, a->bitmap->log_sequence) + a->written;
        io_uring_prep_write(sqe, a->bitmap->fd, a->buffer + a->written, (unsigned)(a->bitmap->log_bytes - a->written),
                            offset);
    } else {
        a->syncs++;
        tell_sync(a->bitmap, true);
        io_uring_prep_fsync(sqe, a->bitmap->fd, IORING_FSYNC_DATASYNC);
    }
    io_uring_sqe_set_data(sqe, &a->op);
    io_uring_sqe_set_flags(sqe, IOSQE_ASYNC); /* it is rare, and the file's system may be any */
}

static void compose_log(struct activity *a)
{
    struct activity_head *head = (struct activity_head *)a->buffer;
    memset(a->buffer, 0, a->bitmap->log_bytes);
    list_each(node, &a->active)
        head->extent[head->count++] = container_of(node, struct active_extent, link)->extent;
    a->bitmap->log_sequence++;
    a->written = 0;
    activity_compose(head, a->bitmap->log_sequence);
}

static void begin_transaction(struct activity *a)
{
    bool evicted = false, claimed = false;
    struct list *stopped_at = &a->waiting;
    list_each(node, &a->waiting) {
        if (claim(a, container_of(node, struct activity_wait, link), &evicted, &claimed))
            continue;
        stopped_at = node->next;
        break;
    }
    for (unsigned n = 0; evicted && n < a->bitmap->slots / EVICT_PART; n++)
        if (!evict(a))
            break;
    for (struct list *node = a->waiting.next; node != stopped_at; node = node->next)
        unclaim(a, container_of(node, struct activity_wait, link));
    if (!claimed)
        return; /* all extents are being written to: when one is left, this is tried again */
    compose_log(a);
    step(a, evicted ? ACTIVITY_SYNC_BITS : ACTIVITY_WRITE);
}

static void committed(struct activity *a)
{
    a->step = ACTIVITY_IDLE;
    list_each(node, &a->active)
        container_of(node, struct active_extent, link)->state = EXTENT_ACTIVE;
}

static void fail(struct activity *a, int error)
{
    struct vs_event event = {.kind = VS_EV_BITMAP_FAILED, .result = error};
    a->step = ACTIVITY_IDLE;
    a->failed = true;
    mailbox_post(a->mailbox, &event);
}

static void stepped(struct uring_op *op, int result, unsigned flags)
{
    struct activity *a = container_of(op, struct activity, op);
    (void)flags;
    a->in_flight--;
    if (result == -EINTR || result == -EAGAIN) {
        step(a, a->step);
    } else if (result < 0 || (a->step == ACTIVITY_WRITE && result == 0) || bitmap_lost(a->bitmap)) {
        fail(a, result < 0 ? result : -EIO);
    } else if (a->step == ACTIVITY_SYNC_BITS) {
        tell_sync(a->bitmap, false);
        step(a, ACTIVITY_WRITE);
    } else if (a->step == ACTIVITY_WRITE) {
        a->written += (uint64_t)result;
        step(a, a->written < a->bitmap->log_bytes ? ACTIVITY_WRITE : ACTIVITY_SYNC_LOG);
    } else {
        tell_sync(a->bitmap, false);
        committed(a);
    }
}

static void let_in(struct activity *a, bool all)
{
    list_each_safe(node, &a->waiting) {
        struct activity_wait *w = container_of(node, struct activity_wait, link);
        if (!all && !try_enter(a, w->offset, w->length))
            return; /* in their order: a wide one is not starved */
        list_remove(&w->link);
        w->entered(w);
    }
}

void activity_pump(struct activity *a)
{
    if (!a->bitmap || a->failed || a->step != ACTIVITY_IDLE)
        return;
    if (bitmap_lost(a->bitmap)) {
        fail(a, -EIO);
        return;
    }
    if (list_empty(&a->waiting))
        return;
    let_in(a, false);
    if (!list_empty(&a->waiting))
        begin_transaction(a);
}

bool activity_may_void(const struct activity *a)
{
    return a->bitmap && a->step == ACTIVITY_IDLE;
}

void activity_void(struct activity *a)
{
    assert(activity_may_void(a));
    a->bitmap = NULL;
    let_in(a, true);
}
