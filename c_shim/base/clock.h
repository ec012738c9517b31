/* SPDX-License-Identifier: Apache-2.0
 *
 * Time, and what is done at a bounded speed.
 */
#ifndef VS_CLOCK_H
#define VS_CLOCK_H

#include <stdint.h>
#include <time.h>

/* Of this thread: time that has passed while it was kept from running (engine.c, "time that was not lived through"). */
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

/* When the next part may begin, if one of so many bytes begins now (or at not_before_ns, where that is later).
 * speed_bytes_per_s 0: there is no limit. */
static inline uint64_t clock_pace_ns(uint64_t not_before_ns, uint64_t now_ns, uint64_t bytes, uint64_t speed_bytes_per_s)
{
    uint64_t from_ns = not_before_ns > now_ns ? not_before_ns : now_ns;
    if (speed_bytes_per_s == 0)
        return not_before_ns;
    return from_ns + (uint64_t)((double)bytes * 1e9 / (double)speed_bytes_per_s);
}

#endif
