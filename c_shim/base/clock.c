/* SPDX-License-Identifier: Apache-2.0
 *
 * How long this process was stopped, as its clocks tell it. See clock.h.
 */
#include "clock.h"

_Thread_local uint64_t clock_missed_ns;

uint64_t clock_gap_ns(struct clock_gaps *g, uint64_t passed_ns, uint64_t slept_ns)
{
    uint64_t late_ns = passed_ns > slept_ns ? passed_ns - slept_ns : 0, earned;
    if (late_ns <= CLOCK_GAP_NS) {
        g->lived_ns += passed_ns;
        earned = g->lived_ns / CLOCK_GAP_EARNED_NS;
        g->lived_ns %= CLOCK_GAP_EARNED_NS;
        g->forgiven -= earned < g->forgiven ? (unsigned)earned : g->forgiven;
        return 0;
    }
    if (g->forgiven == CLOCK_GAPS_IN_A_ROW)
        return 0;
    g->forgiven++;
    return late_ns;
}
