/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "loadgen.h"

static void usage(void)
{
    fputs("usage: loadgen --socket PATH [options]       drives a vhost-user-blk backend, prints JSON\n"
          "       loadgen --check IMAGE --journal FILE [--flushed-only]\n"
          "  --rw read|write|randread|randwrite|rw|randrw   (randread)\n"
          "  --read-percent N        of rw and randrw       (50)\n"
          "  --bs BYTES              a multiple of 512      (4096)\n"
          "  --depth N               requests in flight, per queue, to 256 (32)\n"
          "  --queues N              a thread each, to 64   (1)\n"
          "  --seconds S, --ramp S   measured, and before   (8, 0)\n"
          "  --operations N          end after so many per queue\n"
          "  --stay                  then stay connected until the seconds are over\n"
          "  --span BYTES            use only the beginning of the disk\n"
          "  --flush-every N         a flush after every N writes\n"
          "  --flush-drain           nothing else in flight beside a flush\n"
          "  --poll                  never sleep\n"
          "  --no-indirect, --no-event-idx                  leave these features out\n"
          "  --packed                packed rings in place of split ones\n"
          "  --verify [--journal FILE]   every sector says what it is; checked on read\n"
          "  --interval-ms N         count completions in intervals too\n"
          "  --seed N\n",
          stderr);
    exit(1);
}

static uint64_t number_of(const char *text, uint64_t least, uint64_t most)
{
    char *end;
    errno = 0;
    uint64_t number = strtoull(text, &end, 0);
    if (errno || *end || end == text || number < least || number > most)
        die("%s is no number from %llu to %llu", text, (unsigned long long)least, (unsigned long long)most);
    return number;
}

static void parse_work(struct options *options, const char *text)
{
    options->random = !strncmp(text, "rand", 4);
    const char *kind = options->random ? text + 4 : text;
    if (!strcmp(kind, "read"))
        options->read_percent = 100;
    else if (!strcmp(kind, "write"))
        options->read_percent = 0;
    else if (strcmp(kind, "rw"))
        die("%s is no kind of work", text);
    else if (options->read_percent == 100)
        options->read_percent = 50;
}

/* clang-format off */
enum {
    SOCKET = 1, CHECK, JOURNAL, FLUSHED_ONLY, RW, READ_PERCENT, BS, DEPTH, QUEUES, SECONDS, RAMP, OPERATIONS_MAX,
    SPAN, FLUSH_EVERY, FLUSH_DRAIN, POLL, NO_INDIRECT, NO_EVENT_IDX, PACKED, VERIFY, INTERVAL, SEED, STAY
};

static const struct option option_names[] = {
    {"socket", 1, 0, SOCKET}, {"check", 1, 0, CHECK}, {"journal", 1, 0, JOURNAL},
    {"flushed-only", 0, 0, FLUSHED_ONLY}, {"rw", 1, 0, RW}, {"read-percent", 1, 0, READ_PERCENT}, {"bs", 1, 0, BS},
    {"depth", 1, 0, DEPTH}, {"queues", 1, 0, QUEUES}, {"seconds", 1, 0, SECONDS}, {"ramp", 1, 0, RAMP},
    {"operations", 1, 0, OPERATIONS_MAX}, {"span", 1, 0, SPAN}, {"flush-every", 1, 0, FLUSH_EVERY},
    {"flush-drain", 0, 0, FLUSH_DRAIN}, {"poll", 0, 0, POLL}, {"no-indirect", 0, 0, NO_INDIRECT},
    {"no-event-idx", 0, 0, NO_EVENT_IDX}, {"packed", 0, 0, PACKED}, {"verify", 0, 0, VERIFY},
    {"interval-ms", 1, 0, INTERVAL}, {"seed", 1, 0, SEED}, {"stay", 0, 0, STAY}, {0}
};
/* clang-format on */

void parse_options(struct options *options, int argc, char **argv)
{
    const char *work_name = "randread";
    *options = (struct options){.block_bytes = 4096,
                                .depth = 32,
                                .queues = 1,
                                .read_percent = 100,
                                .random = true,
                                .seconds = 8,
                                .seed = 1,
                                .indirect = true,
                                .event_idx = true};
    for (int option; (option = getopt_long(argc, argv, "", option_names, NULL)) != -1;) {
        /* clang-format off */
        switch (option) {
        case SOCKET: options->socket_path = optarg; break;
        case CHECK: options->check_path = optarg; break;
        case JOURNAL: options->journal_path = optarg; break;
        case FLUSHED_ONLY: options->flushed_only = true; break;
        case RW: work_name = optarg; break;
        case READ_PERCENT: options->read_percent = (uint32_t)number_of(optarg, 0, 99); break;
        case BS: options->block_bytes = number_of(optarg, 512, 8u << 20); break;
        case DEPTH: options->depth = (uint32_t)number_of(optarg, 1, DEPTH_MAX); break;
        case QUEUES: options->queues = (uint32_t)number_of(optarg, 1, QUEUES_MAX); break;
        case SECONDS: options->seconds = strtod(optarg, NULL); break;
        case RAMP: options->ramp_seconds = strtod(optarg, NULL); break;
        case OPERATIONS_MAX: options->operations_max = number_of(optarg, 1, UINT64_MAX); break;
        case SPAN: options->span_bytes = number_of(optarg, 4096, UINT64_MAX); break;
        case FLUSH_EVERY: options->flush_every = (uint32_t)number_of(optarg, 1, UINT32_MAX); break;
        case FLUSH_DRAIN: options->flush_drain = true; break;
        case POLL: options->poll = true; break;
        case NO_INDIRECT: options->indirect = false; break;
        case NO_EVENT_IDX: options->event_idx = false; break;
        case PACKED: options->packed = true; break;
        case VERIFY: options->verify = true; break;
        case INTERVAL: options->interval_ms = (uint32_t)number_of(optarg, 1, 60000); break;
        case SEED: options->seed = number_of(optarg, 0, UINT64_MAX); break;
        case STAY: options->stay = true; break;
        default: usage();
        }
        /* clang-format on */
    }
    if (optind != argc)
        usage();
    if (options->check_path && options->journal_path)
        return;
    if (!options->socket_path || options->block_bytes % SECTOR_BYTES || options->seconds <= 0)
        usage();
    parse_work(options, work_name);
}
