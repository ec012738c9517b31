/* SPDX-License-Identifier: Apache-2.0
 *
 * Time, and what is done at a bounded speed.
 */
#ifndef VS_CLOCK_H
#define VS_CLOCK_H

#include <stdint.h>
#include <time.h>

/* Of this thread: time that has passed while it was kept from running ("time that was not lived through", below). */
extern _Thread_local uint64_t clock_missed_ns;

/* CLOCK_MONOTONIC: what others have seen pass. */
static inline uint64_t clock_world_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* The same without what this thread has missed: what deadlines are measured with. */
static inline uint64_t clock_ns(void)
{
    return clock_world_ns() - clock_missed_ns;
}

/* ---- time that was not lived through ----------------------------------------
 * A process that is stopped (SIGSTOP, a freezer, a debugger, a hypervisor) and goes on finds every deadline passed,
 * though nobody has kept it waiting. So the clock of its thread stands still meanwhile: whatever is compared with it
 * moves by the gap. A gap is what has passed between two looks beyond what was slept on purpose.
 *
 * A thread that is merely slow is late as well, pass after pass. Were all of that forgiven, no deadline of its would
 * ever come. So no more than CLOCK_GAPS_IN_A_ROW gaps are forgiven, and one more for each second lived in time. */

/* Less is the scheduler's. */
#define CLOCK_GAP_NS 250000000u
#define CLOCK_GAPS_IN_A_ROW 8
#define CLOCK_GAP_EARNED_NS 1000000000u

struct clock_gaps {
    unsigned forgiven; /* lately */
    uint64_t lived_ns; /* in time, towards the next that may be */
};

/* What of passed_ns, the time since the last look, was a gap that is forgiven. slept_ns: for so long the thread may
 * have slept; UINT64_MAX: as long as nothing came. */
uint64_t clock_gap_ns(struct clock_gaps *g, uint64_t passed_ns, uint64_t slept_ns);

/* When the next part may begin, if one of so many bytes begins now (or at not_before_ns, where that is later).
 * speed_bytes_per_s 0: there is no limit. */
static inline uint64_t clock_pace_ns(uint64_t not_before_ns, uint64_t now_ns, uint64_t bytes,
                                     uint64_t speed_bytes_per_s)
{
    uint64_t from_ns = not_before_ns > now_ns ? not_before_ns : now_ns;
    if (speed_bytes_per_s == 0)
        return not_before_ns;
    return from_ns + (uint64_t)((double)bytes * 1e9 / (double)speed_bytes_per_s);
}

#endif
