/* SPDX-License-Identifier: Apache-2.0
 *
 * What this process holds: whatever is begun and ended again leaves nothing behind.
 */
#ifndef VS_TEST_HELD_H
#define VS_TEST_HELD_H

#include <dirent.h>
#include <unistd.h>

#include "harness.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1 /* keeps what was freed, in memory and mappings of its own */
#else
#define SANITIZED 0
#endif

/* As in tests/daemon/test_leaks.py. By hand: 1000. */
static inline int leak_cycles(void)
{
    const char *told = getenv("VHOSTSYNC_LEAK_CYCLES");
    return told ? atoi(told) : 20;
}

struct held {
    unsigned descriptors, tasks, mappings, resident_kib;
};

static inline unsigned held_entries(const char *path)
{
    DIR *folder = opendir(path);
    unsigned count = 0;
    CHECK(folder);
    while (readdir(folder))
        count++;
    closedir(folder);
    return count;
}

static inline unsigned held_tasks(void)
{
    DIR *folder = opendir("/proc/self/task");
    unsigned count = 0;
    CHECK(folder);
    for (struct dirent *entry; (entry = readdir(folder));) {
        char path[300], name[32] = "iou-"; /* gone meanwhile, or the kernel's own */
        snprintf(path, sizeof path, "/proc/self/task/%s/comm", entry->d_name);
        FILE *file = fopen(path, "r");
        if (!file)
            continue;
        if (fgets(name, sizeof name, file))
            count += strncmp(name, "iou-", 4) != 0;
        fclose(file);
    }
    closedir(folder);
    return count;
}

static inline unsigned held_lines(const char *path, const char *number_after)
{
    FILE *file = fopen(path, "r");
    char line[512];
    unsigned count = 0, number = 0;
    CHECK(file);
    while (fgets(line, sizeof line, file)) {
        count++;
        if (number_after && !strncmp(line, number_after, strlen(number_after)))
            number = (unsigned)atoi(line + strlen(number_after));
    }
    fclose(file);
    return number_after ? number : count;
}

static inline struct held held_now(void)
{
    return (struct held){.descriptors = held_entries("/proc/self/fd"),
                         .tasks = held_tasks(),
                         .mappings = held_lines("/proc/self/maps", NULL),
                         .resident_kib = held_lines("/proc/self/status", "VmRSS:")};
}

/* A thread that was joined is in /proc for a moment more. */
static inline void held_check(const struct held *before)
{
    struct held now = held_now();
    for (unsigned tries = 0; now.tasks > before->tasks && tries < 1000; tries++) {
        usleep(1000);
        now = held_now();
    }
    CHECK_EQUAL(now.descriptors, before->descriptors);
    CHECK_EQUAL(now.tasks, before->tasks);
    if (SANITIZED)
        return;
    CHECK(now.mappings <= before->mappings + 1);
    CHECK(now.resident_kib <= before->resident_kib + 1024);
}

#endif
