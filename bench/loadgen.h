/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BENCH_LOADGEN_H
#define BENCH_LOADGEN_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "frontend.h"
#include "histogram.h"
#include "journal.h"

enum operation { OP_READ, OP_WRITE, OP_FLUSH, OPERATIONS };

enum { DEPTH_MAX = 256, INTERVALS_MAX = 36000 };

struct options {
    const char *socket_path;
    const char *journal_path;
    const char *check_path; /* check this image instead */
    uint64_t block_bytes;
    uint64_t span_bytes; /* the part of the disk that is used; 0: all */
    uint64_t operations_max;
    uint64_t seed;
    double seconds;
    double ramp_seconds;
    uint32_t depth;
    uint32_t queues;
    uint32_t read_percent;
    uint32_t flush_every; /* writes; 0: never */
    uint32_t interval_ms;
    bool flushed_only;
    bool flush_drain;
    bool random;
    bool poll;
    bool verify;
    bool indirect;
    bool event_idx;
    bool packed;
    bool stay; /* connected, idle, until the time is over */
};

struct flushed_unit {
    uint64_t unit;
    uint32_t generation;
};

struct slot {
    uint64_t start_ns;
    uint64_t unit;
    uint32_t generation; /* of a write */
    uint32_t least;      /* of a read: the generation it must find */
    enum operation operation;
    struct flushed_unit *flushes; /* of a flush in a verifying run: what had been completed before it */
    uint32_t flush_count;
};

/* Owned by its thread while that runs, by the main thread before and after. */
struct worker {
    const struct options *options;
    struct frontend *frontend;
    struct ring *ring;
    struct journal *journal;
    pthread_t thread;
    uint32_t queue;
    int epoll_fd;

    uint8_t *requests; /* per slot: header, status, indirect table */
    uint8_t *data;
    struct slot *slots;
    uint32_t *free_slots;
    uint32_t free_count;
    uint32_t segments;
    struct segment *list; /* of the request that is being put */

    uint64_t random_state;
    uint64_t first_unit;
    uint64_t units;
    uint64_t next_unit;
    uint64_t submitted;
    uint32_t writes_since_flush;
    bool flush_wanted;
    bool flush_running;
    struct flushed_unit *pending; /* completed writes that no flush was sent after */
    uint32_t pending_count;
    uint32_t pending_room;

    struct histogram *latency[OPERATIONS];
    uint64_t errors[OPERATIONS];
    uint64_t kicks;
    uint64_t sleeps;
    uint64_t gap_ns; /* the longest time without a completion while something was in flight */
    uint64_t gap_at_ns;
    uint64_t last_reap_ns;
    uint64_t finished_ns;
    struct verification verification;
    uint32_t *interval; /* completions in each interval */
};

struct run {
    struct options options;
    struct frontend frontend;
    struct journal journal;
    struct worker *workers;
    uint64_t start_ns; /* of the measurement: the ramp is over */
    uint64_t end_ns;
    bool lost; /* the backend hung up */
};

/* Ends the process with the usage, or a sentence, when they are wrong. */
void parse_options(struct options *options, int argc, char **argv);

void report(const struct run *run);

#endif
