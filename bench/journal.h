/* SPDX-License-Identifier: Apache-2.0
 *
 * What a verifying run knows of each unit (the bytes of one request): the last
 * generation that was issued, that was completed, that was flushed. Kept in a mapped
 * file, so that it outlives a killed load generator, and so that an image can be
 * checked against it afterwards.
 *
 * Every sector of 512 bytes carries its number, its generation and a body that
 * follows from both: data of another place, old data, torn data and no data at all
 * are told apart.
 */
#ifndef BENCH_JOURNAL_H
#define BENCH_JOURNAL_H

#include <stdbool.h>
#include <stdint.h>

enum { SECTOR_BYTES = 512, FOUND_MAX = 8 };

struct journal_unit {
    uint32_t issued;
    uint32_t completed; /* every sector holds this generation, or one up to issued */
    uint32_t flushed;   /* the same after a power cut */
    uint32_t busy;      /* a request is in flight: no second one */
};

struct journal_header {
    uint64_t magic;
    uint64_t unit_bytes;
    uint64_t units;
    uint64_t seed; /* of this journal alone: what another run wrote is no data of this one */
};

struct journal {
    struct journal_header *header;
    struct journal_unit *unit;
};

enum verdict { SECTOR_GOOD, SECTOR_NO_DATA, SECTOR_MISPLACED, SECTOR_OLD, SECTOR_FUTURE, SECTOR_TORN, SECTOR_VERDICTS };
extern const char *const verdict_name[SECTOR_VERDICTS];

struct finding {
    uint64_t sector;
    enum verdict verdict;
    uint32_t generation; /* as found */
    uint32_t least;
    uint32_t most;
};

struct verification {
    uint64_t sectors;
    uint64_t bad;
    struct finding found[FOUND_MAX];
};

/* path NULL: in memory only. An existing file is continued; it must fit. */
void journal_open(struct journal *journal, const char *path, uint64_t unit_bytes, uint64_t units);

void pattern_fill(void *buffer, uint64_t bytes, uint64_t sector, uint32_t generation, uint64_t seed);

/* Each sector must be of a generation from least to most; least 0: not written for sure, anything goes. */
void pattern_check(struct verification *result, const void *buffer, uint64_t bytes, uint64_t sector, uint32_t least,
                   uint32_t most, uint64_t seed);

/* Checks an image against what was completed, or only what was flushed. Returns false when a sector is bad. */
bool journal_check_image(const char *journal_path, const char *image_path, bool flushed_only);

#endif
