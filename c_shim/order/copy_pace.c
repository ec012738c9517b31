/* SPDX-License-Identifier: Apache-2.0
 *
 * Decides how much of the bulk copy is in flight while the guest works.
 *
 * While the guest works, what it asks of a disk waits there behind what the
 * copy has in flight. At a near disk nearly all of a request's time is its
 * transfer: more in flight makes the queue longer and nothing else, so the copy
 * keeps one part of COPY_BESIDE_BYTES there. A far disk (a network) has the time
 * pass on the way, and takes much more at once before anybody waits longer. So
 * the copy watches its own requests, as background transports in networks do
 * (LEDBAT, RFC 6817):
 *
 *   - With one part in flight it finds what a request takes alone. The disk is
 *     far if not even the fastest took less than COPY_FAR_NS.
 *   - While one of the two disks is far, the window doubles from round to round,
 *     until requests to a far disk take longer by half of the slack: a quarter of
 *     their time alone, and no more than COPY_SLACK_NS. Past all of it the window is
 *     halved, and more is tried again PAUSE_ROUNDS later.
 *   - One fast answer of a disk that seemed to be far: it was merely slow for a
 *     moment. Back to one part; the same every RENEW_NS, for disks change.
 *
 * A near source has one read at a time whatever the window is; and with one
 * near disk, parts stay small. Invariant: never less than one part, so that the
 * copy ends; never more than the copy may have in flight when the guest rests.
 *
 * What is not looked at: writes of zeroes, and how the guest itself fares.
 */
#include "copy_pace.h"

#include <string.h>

#include "bounds.h"

#define RENEW_NS 10000000000u
#define PAUSE_ROUNDS 16u

static void begin_round(struct copy_pace *p, uint64_t window_bytes)
{
    p->window_bytes = window_bytes;
    p->round++;
    for (unsigned i = 0; i < COPY_DISKS; i++)
        p->disk[i].seen = 0;
}

void copy_pace_init(struct copy_pace *p, unsigned depth, uint64_t region_bytes, uint64_t now_ns)
{
    uint64_t round = p->round; /* requests of the former copy may still be under way */
    memset(p, 0, sizeof *p);
    p->round = round;
    p->depth = depth;
    p->least_bytes = region_bytes > COPY_BESIDE_BYTES ? region_bytes : COPY_BESIDE_BYTES;
    p->renew_ns = now_ns + RENEW_NS;
    begin_round(p, p->least_bytes);
}

static void add(struct copy_latency *d, uint64_t ns)
{
    unsigned at = d->seen++;
    for (; at > 0 && d->ns[at - 1] > ns; at--)
        d->ns[at] = d->ns[at - 1];
    d->ns[at] = ns;
}

/* A quarter of them were faster. A queue makes all of them late; those that are late for other reasons (this machine's,
 * too) say nothing. */
static uint64_t typical_ns(const struct copy_latency *d)
{
    return d->ns[d->seen / 4];
}

/* Each part is read once, so reads fill a round; half as many writes say something. */
static bool is_known(const struct copy_latency *d)
{
    return d->seen >= COPY_ROUND / 2;
}

static void learn_alone(struct copy_latency *d)
{
    d->far = is_known(d) && d->ns[0] >= COPY_FAR_NS;
    d->alone_ns = is_known(d) ? typical_ns(d) : 0;
}

static bool is_slower_by(const struct copy_latency *d, uint64_t slack_ns)
{
    return d->far && is_known(d) && typical_ns(d) > d->alone_ns + slack_ns;
}

static uint64_t slack_ns(const struct copy_latency *d)
{
    return d->alone_ns / 4 < COPY_SLACK_NS ? d->alone_ns / 4 : COPY_SLACK_NS;
}

static bool is_crowded(const struct copy_latency *d)
{
    return is_slower_by(d, slack_ns(d));
}

/* Twice as much would be too much. */
static bool is_full(const struct copy_latency *d)
{
    return is_slower_by(d, slack_ns(d) / 2);
}

static bool is_far(const struct copy_latency *d)
{
    return d->far;
}

static bool seemed_far(const struct copy_latency *d)
{
    return d->far && d->seen && d->ns[0] < COPY_FAR_NS;
}

static bool any(const struct copy_pace *p, bool (*is)(const struct copy_latency *))
{
    return is(&p->disk[COPY_SOURCE]) || is(&p->disk[COPY_DESTINATION]);
}

static uint64_t doubled(const struct copy_pace *p)
{
    bool both_far = p->disk[COPY_SOURCE].far && p->disk[COPY_DESTINATION].far;
    uint64_t most = p->depth * (both_far ? COPY_BYTES : p->least_bytes);
    return 2 * p->window_bytes < most ? 2 * p->window_bytes : most;
}

static uint64_t halved(const struct copy_pace *p)
{
    return p->window_bytes / 2 > p->least_bytes ? p->window_bytes / 2 : p->least_bytes;
}

static void end_round(struct copy_pace *p, uint64_t now_ns)
{
    uint64_t window_bytes = p->window_bytes;
    if (window_bytes == p->least_bytes) {
        learn_alone(&p->disk[COPY_SOURCE]);
        learn_alone(&p->disk[COPY_DESTINATION]);
    }
    if (now_ns >= p->renew_ns || any(p, seemed_far)) {
        window_bytes = p->least_bytes;
        p->renew_ns = now_ns + RENEW_NS;
        p->pause_rounds = 0;
    } else if (any(p, is_crowded)) {
        window_bytes = halved(p);
        p->pause_rounds = PAUSE_ROUNDS;
    } else if (p->pause_rounds > 0) {
        p->pause_rounds--;
    } else if (any(p, is_far) && !any(p, is_full)) {
        window_bytes = doubled(p);
    }
    begin_round(p, window_bytes);
}

void copy_pace_completed(struct copy_pace *p, enum copy_disk disk, uint64_t round, uint64_t latency_ns, uint64_t now_ns)
{
    struct copy_latency *d = &p->disk[disk];
    if (round != p->round || d->seen == COPY_ROUND)
        return;
    add(d, latency_ns);
    if (p->disk[COPY_SOURCE].seen == COPY_ROUND)
        end_round(p, now_ns);
}

uint64_t copy_pace_part_bytes(const struct copy_pace *p)
{
    uint64_t bytes = p->window_bytes / p->depth;
    return bytes < p->least_bytes ? p->least_bytes : bytes;
}

unsigned copy_pace_parts(const struct copy_pace *p)
{
    return (unsigned)(p->window_bytes / copy_pace_part_bytes(p));
}

unsigned copy_pace_reads(const struct copy_pace *p)
{
    return p->disk[COPY_SOURCE].far ? copy_pace_parts(p) : 1;
}
