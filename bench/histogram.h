/* SPDX-License-Identifier: Apache-2.0
 *
 * Latencies, log-linear: 32 buckets for each power of two, so a bucket's bounds lie
 * within 3.2 % of each other.
 */
#ifndef BENCH_HISTOGRAM_H
#define BENCH_HISTOGRAM_H

#include <stdint.h>

enum { SUB_BITS = 5, SUB = 1 << SUB_BITS, BUCKETS = (64 - SUB_BITS + 1) * SUB };

struct histogram {
    uint64_t bucket[BUCKETS];
    uint64_t count;
    uint64_t total_ns;
    uint64_t max_ns;
};

static inline uint32_t bucket_of(uint64_t ns)
{
    if (ns < SUB)
        return (uint32_t)ns;
    uint32_t power = 63 - (uint32_t)__builtin_clzll(ns);
    return (power - SUB_BITS + 1) * SUB + (uint32_t)(ns >> (power - SUB_BITS) & (SUB - 1));
}

static inline uint64_t bucket_floor(uint32_t bucket)
{
    if (bucket < SUB)
        return bucket;
    uint32_t power = bucket / SUB + SUB_BITS - 1;
    return (uint64_t)(SUB + bucket % SUB) << (power - SUB_BITS);
}

static inline void histogram_add(struct histogram *histogram, uint64_t ns)
{
    histogram->bucket[bucket_of(ns)]++;
    histogram->count++;
    histogram->total_ns += ns;
    if (ns > histogram->max_ns)
        histogram->max_ns = ns;
}

static inline void histogram_merge(struct histogram *into, const struct histogram *from)
{
    for (uint32_t i = 0; i < BUCKETS; i++)
        into->bucket[i] += from->bucket[i];
    into->count += from->count;
    into->total_ns += from->total_ns;
    if (from->max_ns > into->max_ns)
        into->max_ns = from->max_ns;
}

/* The middle of the bucket that the given part (0 to 1) of all latencies reaches. */
static inline uint64_t histogram_percentile(const struct histogram *histogram, double part)
{
    uint64_t wanted = (uint64_t)(part * (double)histogram->count), seen = 0;
    for (uint32_t i = 0; i < BUCKETS; i++) {
        seen += histogram->bucket[i];
        if (seen > wanted)
            return (bucket_floor(i) + bucket_floor(i + 1)) / 2;
    }
    return histogram->max_ns;
}

#endif
