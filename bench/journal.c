/* SPDX-License-Identifier: Apache-2.0 */
#include "journal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "frontend.h"

#define JOURNAL_MAGIC 0x31304c4e524a5356ull
#define SECTOR_MAGIC 0x4b434f4c42534856ull

const char *const verdict_name[SECTOR_VERDICTS] = {
    "good", "no data", "data of another sector", "old data", "data never written", "torn or damaged data"};

struct sector {
    uint64_t magic;
    uint64_t number;
    uint64_t generation;
    uint64_t body[SECTOR_BYTES / 8 - 3];
};
_Static_assert(sizeof(struct sector) == SECTOR_BYTES, "a sector is a sector");

/* splitmix64 (public domain, Sebastiano Vigna): the body is its sequence from a start that each field changes */
static uint64_t mix(uint64_t value)
{
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9ull;
    value = (value ^ value >> 27) * 0x94d049bb133111ebull;
    return value ^ value >> 31;
}

static uint64_t body_word(uint64_t start, uint32_t index)
{
    return mix(start + index * 0x9e3779b97f4a7c15ull);
}

static uint64_t body_start(uint64_t number, uint64_t generation, uint64_t seed)
{
    return mix(mix(mix(seed) + number) + generation);
}

void pattern_fill(void *buffer, uint64_t bytes, uint64_t number, uint32_t generation, uint64_t seed)
{
    struct sector *sector = buffer;
    for (uint64_t end = number + bytes / SECTOR_BYTES; number < end; number++, sector++) {
        sector->magic = SECTOR_MAGIC ^ seed;
        sector->number = number;
        sector->generation = generation;
        uint64_t start = body_start(number, generation, seed);
        for (uint32_t i = 0; i < sizeof sector->body / 8; i++)
            sector->body[i] = body_word(start, i);
    }
}

static enum verdict judge(const struct sector *sector, uint64_t number, uint32_t least, uint32_t most, uint64_t seed)
{
    if (sector->magic != (SECTOR_MAGIC ^ seed))
        return SECTOR_NO_DATA;
    if (sector->number != number)
        return SECTOR_MISPLACED;
    if (sector->generation < least)
        return SECTOR_OLD;
    if (sector->generation > most)
        return SECTOR_FUTURE;
    uint64_t start = body_start(number, sector->generation, seed);
    for (uint32_t i = 0; i < sizeof sector->body / 8; i++)
        if (sector->body[i] != body_word(start, i))
            return SECTOR_TORN;
    return SECTOR_GOOD;
}

void pattern_check(struct verification *result, const void *buffer, uint64_t bytes, uint64_t number, uint32_t least,
                   uint32_t most, uint64_t seed)
{
    if (!least)
        return;
    const struct sector *sector = buffer;
    for (uint64_t end = number + bytes / SECTOR_BYTES; number < end; number++, sector++) {
        enum verdict verdict = judge(sector, number, least, most, seed);
        result->sectors++;
        if (verdict == SECTOR_GOOD)
            continue;
        if (result->bad < FOUND_MAX)
            result->found[result->bad] = (struct finding){number, verdict, (uint32_t)sector->generation, least, most};
        result->bad++;
    }
}

void journal_open(struct journal *journal, const char *path, uint64_t unit_bytes, uint64_t units)
{
    size_t bytes = sizeof *journal->header + units * sizeof *journal->unit;
    int fd = -1;
    if (path) {
        fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0 || ftruncate(fd, (off_t)bytes) < 0)
            die("journal %s: %s", path, strerror(errno));
    }
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, path ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, fd, 0);
    if (memory == MAP_FAILED)
        die("journal: %s", strerror(errno));
    if (fd >= 0)
        close(fd);
    journal->header = memory;
    journal->unit = (struct journal_unit *)(journal->header + 1);
    uint64_t seed;
    if (getrandom(&seed, sizeof seed, 0) != sizeof seed)
        die("getrandom: %s", strerror(errno));
    if (!journal->header->magic)
        *journal->header = (struct journal_header){JOURNAL_MAGIC, unit_bytes, units, seed};
    const struct journal_header *header = journal->header;
    if (header->magic != JOURNAL_MAGIC || header->unit_bytes != unit_bytes || header->units != units)
        die("journal %s is of a run with other blocks or another size", path);
    for (uint64_t i = 0; i < units; i++)
        journal->unit[i].busy = 0;
}

static void print_result(const struct verification *result)
{
    printf("{\"sectors_checked\": %llu, \"sectors_bad\": %llu, \"first\": [", (unsigned long long)result->sectors,
           (unsigned long long)result->bad);
    for (uint64_t i = 0; i < result->bad && i < FOUND_MAX; i++) {
        const struct finding *found = &result->found[i];
        printf("%s{\"sector\": %llu, \"what\": \"%s\", \"generation\": %u, \"least\": %u, \"most\": %u}", i ? ", " : "",
               (unsigned long long)found->sector, verdict_name[found->verdict], found->generation, found->least,
               found->most);
    }
    printf("]}\n");
}

bool journal_check_image(const char *journal_path, const char *image_path, bool flushed_only)
{
    int fd = open(journal_path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (fd < 0 || fstat(fd, &status) < 0)
        die("journal %s: %s", journal_path, strerror(errno));
    const struct journal_header *header = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (header == MAP_FAILED || header->magic != JOURNAL_MAGIC)
        die("%s is no journal", journal_path);
    const struct journal_unit *unit = (const struct journal_unit *)(header + 1);
    int image = open(image_path, O_RDONLY | O_CLOEXEC);
    if (image < 0)
        die("image %s: %s", image_path, strerror(errno));
    void *buffer = malloc(header->unit_bytes);
    if (!buffer)
        die("no memory");
    struct verification result = {0};
    for (uint64_t i = 0; i < header->units; i++) {
        uint32_t least = flushed_only ? unit[i].flushed : unit[i].completed;
        if (!least)
            continue;
        uint64_t offset = i * header->unit_bytes;
        if (pread(image, buffer, header->unit_bytes, (off_t)offset) != (ssize_t)header->unit_bytes)
            die("image %s cannot be read at %llu", image_path, (unsigned long long)offset);
        pattern_check(&result, buffer, header->unit_bytes, offset / SECTOR_BYTES, least, unit[i].issued, header->seed);
    }
    free(buffer);
    print_result(&result);
    return result.bad == 0;
}
