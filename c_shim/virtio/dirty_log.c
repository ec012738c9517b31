/* SPDX-License-Identifier: Apache-2.0
 *
 * Maps the frontend's log of dirty pages and marks pages in it. See dirty_log.h.
 */
#include "dirty_log.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int map_new(struct dirty_log *log, int fd, uint64_t bytes, uint64_t offset)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), start = offset & ~(page - 1);
    struct stat st;
    if (bytes == 0 || bytes > DIRTY_LOG_BYTES_MAX || offset > INT64_MAX - page - bytes)
        return -EINVAL;
    if (fstat(fd, &st) < 0)
        return -errno;
    if ((uint64_t)st.st_size < offset + bytes)
        return -EINVAL; /* would be SIGBUS at the first mark */
    log->map_bytes = (offset - start + bytes + page - 1) & ~(page - 1);
    log->map = mmap(NULL, log->map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)start);
    if (log->map == MAP_FAILED) {
        log->map = NULL;
        return -errno;
    }
    log->bits = (uint8_t *)log->map + (offset - start);
    log->bytes = bytes;
    log->sigbus_slot = guest_memory_watch(log->map, log->map_bytes);
    if (log->sigbus_slot < 0) {
        munmap(log->map, log->map_bytes);
        log->map = NULL;
        return -ENOSPC;
    }
    return 0;
}

int dirty_log_map(struct dirty_log *log, int fd, uint64_t bytes, uint64_t offset)
{
    struct dirty_log new = {.map = NULL};
    int rc = map_new(&new, fd, bytes, offset);
    close(fd);
    if (rc < 0)
        return rc;
    if (log->missed) /* nobody knows any more which pages those were */
        memset(new.bits, 0xff, new.bytes);
    dirty_log_unmap(log);
    *log = new;
    return 0;
}

void dirty_log_unmap(struct dirty_log *log)
{
    if (log->map) {
        guest_memory_unwatch(log->sigbus_slot);
        munmap(log->map, log->map_bytes);
    }
    *log = (struct dirty_log){.map = NULL};
}

bool dirty_log_lost(const struct dirty_log *log)
{
    return log->too_small || (log->map && guest_memory_watched_lost(log->sigbus_slot));
}

void dirty_log_mark(struct dirty_log *log, uint64_t addr, uint64_t bytes)
{
    uint64_t page = addr / DIRTY_LOG_PAGE_BYTES, last = (addr + (bytes - 1)) / DIRTY_LOG_PAGE_BYTES;
    if (!log->map) {
        log->missed = true;
        return;
    }
    if (addr + (bytes - 1) < addr || last / 8 >= log->bytes) {
        log->too_small = true;
        return;
    }
    /* Also where the bit is set already: the frontend may have taken it away since, and have read the page
     * before our bytes were there. The order of our stores is the exchange's. */
    for (; page <= last; page++)
        (void)__atomic_fetch_or(&log->bits[page / 8], (uint8_t)(1u << page % 8), __ATOMIC_SEQ_CST);
    log->changed = true;
}

void dirty_log_mark_host(struct dirty_log *log, const struct mem_table *table, const void *host, uint64_t bytes)
{
    dirty_log_mark(log, guest_addr_of(table, host), bytes);
}
