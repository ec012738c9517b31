/* SPDX-License-Identifier: Apache-2.0
 *
 * Waiting for what must come. A loaded machine may give a test no processor for longer than any bound that a
 * person would wait for: so only time in which this process had nothing to do is counted. What never comes is
 * noticed all the same, for then all of its threads sleep.
 */
#ifndef VS_TEST_PATIENCE_H
#define VS_TEST_PATIENCE_H

#include <dirent.h>
#include <poll.h>

#include "harness.h"

#define PATIENCE_MS 20000
#define PATIENCE_LOOK_MS 1000
#define PATIENCE_IDLE_NS 50000000 /* of each look: a thread that wakes now and then for its deadlines */

/* How long this process's threads have run, or have waited for a processor. 0: this kernel does not say. */
static inline uint64_t patience_busy_ns(void)
{
    DIR *folder = opendir("/proc/self/task");
    uint64_t sum = 0;
    CHECK(folder);
    for (struct dirent *entry; (entry = readdir(folder));) {
        char path[300];
        uint64_t ran, waited;
        snprintf(path, sizeof path, "/proc/self/task/%s/schedstat", entry->d_name);
        FILE *file = fopen(path, "r");
        if (!file)
            continue; /* gone meanwhile */
        if (fscanf(file, "%" SCNu64 " %" SCNu64, &ran, &waited) == 2)
            sum += ran + waited;
        fclose(file);
    }
    closedir(folder);
    return sum;
}

/* Whether there is something to read. false: not within so much idle time. */
static inline bool patience_readable(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    for (unsigned idle_ms = 0; idle_ms < PATIENCE_MS;) {
        uint64_t before = patience_busy_ns();
        if (poll(&p, 1, PATIENCE_LOOK_MS) != 0)
            return true;
        /* Less than before: a thread has ended. */
        uint64_t now = patience_busy_ns();
        if (now >= before && now - before < PATIENCE_IDLE_NS)
            idle_ms += PATIENCE_LOOK_MS;
    }
    return false;
}

#endif
