/* SPDX-License-Identifier: Apache-2.0
 *
 * The result as JSON on stdout: times in nanoseconds.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>

#include "loadgen.h"

#define ULL(number) ((unsigned long long)(number))

static const char *const operation_name[OPERATIONS] = {"read", "write", "flush"};

static double seconds_of(struct timeval time)
{
    return (double)time.tv_sec + (double)time.tv_usec / 1e6;
}

static void report_operation(const struct run *run, enum operation operation, double seconds, bool first)
{
    static struct histogram all;
    uint64_t errors = 0;
    all = (struct histogram){0};
    for (uint32_t queue = 0; queue < run->options.queues; queue++) {
        histogram_merge(&all, run->workers[queue].latency[operation]);
        errors += run->workers[queue].errors[operation];
    }
    if (!all.count && !errors)
        return;
    printf("%s\n  \"%s\": {\"count\": %llu, \"errors\": %llu, \"per_s\": %.1f, \"bytes_per_s\": %.0f,\n",
           first ? "" : ",", operation_name[operation], ULL(all.count), ULL(errors), (double)all.count / seconds,
           operation == OP_FLUSH ? 0 : (double)all.count * (double)run->options.block_bytes / seconds);
    printf("   \"latency_ns\": {\"mean\": %.0f, \"p50\": %llu, \"p90\": %llu, \"p99\": %llu, "
           "\"p99.9\": %llu, \"max\": %llu},\n",
           all.count ? (double)all.total_ns / (double)all.count : 0, ULL(histogram_percentile(&all, 0.5)),
           ULL(histogram_percentile(&all, 0.9)), ULL(histogram_percentile(&all, 0.99)),
           ULL(histogram_percentile(&all, 0.999)), ULL(all.max_ns));
    printf("   \"histogram\": [");
    const char *separator = "";
    for (uint32_t i = 0; i < BUCKETS; i++)
        if (all.bucket[i]) {
            printf("%s[%llu, %llu]", separator, ULL(bucket_floor(i)), ULL(all.bucket[i]));
            separator = ", ";
        }
    printf("]}");
}

static void report_verification(const struct run *run)
{
    struct verification all = {0};
    for (uint32_t queue = 0; queue < run->options.queues; queue++) {
        const struct verification *one = &run->workers[queue].verification;
        for (uint64_t i = 0; i < one->bad && i < FOUND_MAX && all.bad + i < FOUND_MAX; i++)
            all.found[all.bad + i] = one->found[i];
        all.bad += one->bad;
        all.sectors += one->sectors;
    }
    printf(",\n \"verify\": {\"sectors_checked\": %llu, \"sectors_bad\": %llu, \"first\": [", ULL(all.sectors),
           ULL(all.bad));
    for (uint64_t i = 0; i < all.bad && i < FOUND_MAX && all.found[i].verdict; i++) {
        const struct finding *found = &all.found[i];
        printf("%s{\"sector\": %llu, \"what\": \"%s\", \"generation\": %u, \"least\": %u, \"most\": %u}", i ? ", " : "",
               ULL(found->sector), verdict_name[found->verdict], found->generation, found->least, found->most);
    }
    printf("]}");
}

static void report_intervals(const struct run *run, uint64_t last_ns)
{
    uint64_t interval_ns = run->options.interval_ms * 1000000ull;
    uint64_t count = last_ns > run->start_ns ? (last_ns - run->start_ns) / interval_ns : 0;
    printf(",\n \"interval_ms\": %u, \"intervals\": [", run->options.interval_ms);
    for (uint64_t i = 0; i < count && i < INTERVALS_MAX; i++) {
        uint64_t completions = 0;
        for (uint32_t queue = 0; queue < run->options.queues; queue++)
            completions += run->workers[queue].interval[i];
        printf("%s%llu", i ? ", " : "", ULL(completions));
    }
    printf("]");
}

void report(const struct run *run)
{
    const struct options *options = &run->options;
    uint64_t last_ns = 0, submitted = 0, kicks = 0, sleeps = 0, gap_ns = 0, gap_at_ns = 0;
    for (uint32_t queue = 0; queue < options->queues; queue++) {
        const struct worker *worker = &run->workers[queue];
        submitted += worker->submitted;
        kicks += worker->kicks;
        sleeps += worker->sleeps;
        if (worker->finished_ns > last_ns)
            last_ns = worker->finished_ns;
        if (worker->gap_ns > gap_ns) {
            gap_ns = worker->gap_ns;
            gap_at_ns = worker->gap_at_ns;
        }
    }
    if (last_ns > run->end_ns)
        last_ns = run->end_ns;
    double seconds = last_ns > run->start_ns ? (double)(last_ns - run->start_ns) / 1e9 : 1e-9;
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf("{\"block_bytes\": %llu, \"depth\": %u, \"queues\": %u, \"read_percent\": %u, \"random\": %s, "
           "\"flush_every\": %u,\n",
           ULL(options->block_bytes), options->depth, options->queues, options->read_percent,
           options->random ? "true" : "false", options->flush_every);
    printf(" \"capacity_bytes\": %llu, \"ring_size\": %u, \"indirect\": %s, \"event_idx\": %s, "
           "\"poll\": %s, \"lost\": %s,\n",
           ULL(run->frontend.capacity_bytes), run->frontend.ring_size, options->indirect ? "true" : "false",
           options->event_idx ? "true" : "false", options->poll ? "true" : "false", run->lost ? "true" : "false");
    printf(" \"seconds\": %.3f, \"submitted\": %llu, \"kicks\": %llu, \"sleeps\": %llu, "
           "\"cpu_user_s\": %.3f, \"cpu_system_s\": %.3f,\n",
           seconds, ULL(submitted), ULL(kicks), ULL(sleeps), seconds_of(usage.ru_utime), seconds_of(usage.ru_stime));
    printf(" \"longest_gap_ns\": %llu, \"longest_gap_at_ns\": %llu, \"started_monotonic_ns\": %llu,\n"
           " \"operations\": {",
           ULL(gap_ns), ULL(gap_at_ns), ULL(run->start_ns));
    bool first = true;
    for (int i = 0; i < OPERATIONS; i++) {
        report_operation(run, i, seconds, first);
        for (uint32_t queue = 0; queue < options->queues; queue++)
            first = first && !run->workers[queue].latency[i]->count && !run->workers[queue].errors[i];
    }
    printf("}");
    if (options->verify)
        report_verification(run);
    if (options->interval_ms)
        report_intervals(run, last_ns);
    printf("}\n");
}
