/* SPDX-License-Identifier: Apache-2.0
 *
 * Looks for work for a moment before the engine's thread goes to sleep.
 *
 * Waking a thread on another core costs more than many a request. So where the next thing to do is likely to come soon,
 * the thread looks at the rings and at the completion queue for a while before it sleeps in the kernel.
 *
 * Invariant: the thread sleeps only after it has asked every running ring for a kick and then found that ring empty
 * (virtqueue_ask_for_kick). While the poller is willing to look, a ring that is found empty is not asked, so that the
 * guest need not kick. Such a ring stands in "rings" until it has work again, or until the poller gives up and asks it.
 *
 * Where polling is adaptive, it has to pay:
 *   - The thread stays awake for the guest. It stays awake for a disk only around a flush: a flush is several short
 *     waits in a row for worker threads, each of which needs a core, and a thread that slept would begin every one of
 *     these waits with somebody's wake-up.
 *   - The time from "nothing to do" to the next thing to do is smoothed. Only where it lies within the window is it
 *     waited for awake, and then no longer than a few times as long. So an idle guest or a slow disk costs nothing.
 *   - At every look the core is offered to whoever is queued for it. Otherwise the kernel would let the threads that we
 *     have just woken wait until we fall asleep.
 *   - Time that is missing between two looks was taken by somebody who wanted the core for long (or by the hypervisor).
 *     Then the core is left to them for a while, which doubles each time.
 *
 * With DEFER_TASKRUN the kernel posts completions only when the thread enters it; IORING_SQ_TASKRUN says that there are
 * some to be posted.
 */
#include "poller.h"

#include <sched.h>

#include "attachment.h"
#include "clock.h"

#define GUEST_WINDOW_NS 80000u
/* For disks. A flush of a virtual disk takes about half of it. */
#define DISK_WINDOW_NS 200000u
/* Who has just flushed is likely to do so again. */
#define FLUSHED_LATELY_NS 1000000u
/* An expected gap is waited for up to so many times over. */
#define PATIENCE 4u
/* Gaps count in eighths: a handful of them change the mind. */
#define SMOOTHING 8u
/* Two looks lie well under a microsecond apart. An interrupt takes some more; another thread, a time slice. */
#define STOLEN_NS 200000u
#define BACK_OFF_NS_MIN 10000000u
#define BACK_OFF_NS_MAX 1000000000u
/* Looks between two glances at the clock. */
#define LOOKS 8u

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

void poller_init(struct poller *p, struct disk_host *host, uint32_t poll_us)
{
    p->host = host;
    list_init(&p->rings);
    p->adaptive = poll_us == VS_POLL_AUTO;
    p->fixed_ns = p->adaptive ? 0 : (uint64_t)poll_us * 1000;
    p->guest = (struct expectation){.window_ns = GUEST_WINDOW_NS, .gap_ns = GUEST_WINDOW_NS * 2};
    p->disk = (struct expectation){.window_ns = DISK_WINDOW_NS, .gap_ns = DISK_WINDOW_NS * 2};
    p->back_off_ns = BACK_OFF_NS_MIN;
}

static bool flushes(struct outlook outlook, uint64_t now_ns)
{
    return outlook.flush || now_ns < outlook.flushed_ns + FLUSHED_LATELY_NS;
}

/* What is waited for, if that may pay. Not for a disk in general: it takes longer than a wake-up, so that wins
 * nothing (measured: a 20 us window before a 40 us disk is worse than none). */
static struct expectation *expected(struct poller *p, struct outlook outlook, uint64_t now_ns)
{
    if (!outlook.disk)
        return &p->guest;
    return flushes(outlook, now_ns) ? &p->disk : NULL;
}

/* How long x is worth to be waited for awake; 0: not at all. */
static uint64_t worth_ns(const struct poller *p, const struct expectation *x, uint64_t now_ns)
{
    if (!p->adaptive)
        return p->fixed_ns;
    if (!x || now_ns < p->not_before_ns || x->gap_ns > x->window_ns)
        return 0;
    return x->gap_ns * PATIENCE < x->window_ns ? x->gap_ns * PATIENCE : x->window_ns;
}

bool poller_keeps(struct poller *p, struct queue *q)
{
    if (!p->willing)
        return false;
    list_append(&p->rings, &q->ready_link);
    return true;
}

/* Moves rings with work to "ready"; true: there were some. */
static bool look_at_rings(struct poller *p)
{
    bool found = false;
    list_each_safe(node, &p->rings) {
        struct queue *q = container_of(node, struct queue, ready_link);
        if (!virtqueue_has_more(&q->vq))
            continue;
        queue_ready(q);
        found = true;
    }
    return found;
}

void poller_begin(struct poller *p, struct outlook outlook)
{
    uint64_t now_ns = p->host->now_ns;
    p->willing = outlook.takes_up && worth_ns(p, expected(p, outlook, now_ns), now_ns) > 0;
    look_at_rings(p); /* also while there is no time to look longer */
}

/* Asks all of them for a kick; true: one has work already. */
static bool ask_for_kicks(struct poller *p)
{
    struct list *node;
    bool found = false;
    while ((node = list_pop(&p->rings))) {
        struct queue *q = container_of(node, struct queue, ready_link);
        if (!virtqueue_ask_for_kick(&q->vq))
            continue;
        queue_ready(q);
        found = true;
    }
    return found;
}

/* The core was taken away between two looks. */
static void leave_core(struct poller *p, uint64_t now_ns)
{
    p->not_before_ns = now_ns + p->back_off_ns;
    if (p->back_off_ns < BACK_OFF_NS_MAX)
        p->back_off_ns *= 2;
}

/* Looks until something comes (true) or "until". */
static bool spin(struct poller *p, uint64_t from_ns, uint64_t until_ns)
{
    uint64_t last_ns = from_ns, now_ns;
    bool found = false;
    do {
        for (unsigned i = 0; i < LOOKS && !found; i++) {
            relax();
            found = uring_has_work(p->host->uring) || io_threads_returned(&p->host->threads) || look_at_rings(p);
        }
        if (!found)
            sched_yield();
        now_ns = clock_ns();
        if (p->adaptive && now_ns - last_ns > STOLEN_NS) {
            leave_core(p, now_ns);
            break;
        }
        last_ns = now_ns;
    } while (!found && now_ns < until_ns);
    p->polls++;
    p->hits += found;
    p->polled_ns += now_ns - from_ns;
    if (found && p->back_off_ns > BACK_OFF_NS_MIN)
        p->back_off_ns -= p->back_off_ns / 64;
    return found;
}

static void learn(struct expectation *x, uint64_t gap_ns)
{
    uint64_t most_ns = x->window_ns * 4; /* one long silence is one, however long */
    gap_ns = gap_ns < most_ns ? gap_ns : most_ns;
    x->gap_ns = (x->gap_ns * (SMOOTHING - 1) + gap_ns) / SMOOTHING;
}

bool poller_look(struct poller *p, struct outlook outlook, uint64_t wait_ns)
{
    struct expectation *x;
    uint64_t from_ns, worth = 0;
    bool found = false;
    if (!p->adaptive && !p->fixed_ns)
        return false;
    from_ns = clock_ns();
    x = expected(p, outlook, from_ns);
    if (p->willing)
        worth = worth_ns(p, x, from_ns);
    if (worth > wait_ns)
        worth = wait_ns;
    if (worth) {
        uring_submit(p->host->uring);
        found = spin(p, from_ns, from_ns + worth);
    }
    if (!found)
        found = ask_for_kicks(p);
    if (!x)
        return found;
    if (found)
        learn(x, clock_ns() - from_ns);
    else
        x->asleep_since_ns = from_ns;
    return found;
}

static void woken(struct expectation *x)
{
    if (x->asleep_since_ns)
        learn(x, clock_ns() - x->asleep_since_ns);
    x->asleep_since_ns = 0;
}

void poller_woken(struct poller *p)
{
    woken(&p->guest);
    woken(&p->disk);
}
