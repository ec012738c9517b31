/* SPDX-License-Identifier: Apache-2.0
 *
 * Maps the guest's memory, translates its addresses, and survives that a mapping loses its file. See guest_memory.h.
 */
#include "guest_memory.h"

#include <errno.h>
#include <linux/magic.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

/* ---- SIGBUS ------------------------------------------------------------ */

/* What the signal handler may look at: mappings of all engines of the process.
 * A slot is written by the thread that maps, before any access, and read by
 * the handler in the thread that touched the memory. */
#define SIGBUS_SLOTS (VS_MAX_ATTACHMENTS * (VS_MAX_MEM_SLOTS + 4) + 8)
static struct {
    atomic_uintptr_t start; /* 0: free */
    atomic_uintptr_t end;
    atomic_bool lost;
} mapping[SIGBUS_SLOTS];
static atomic_uint lost_mappings; /* spares guest_memory_lost() the search */

int guest_memory_watch(void *start, uint64_t bytes)
{
    for (int i = 0; i < SIGBUS_SLOTS; i++) {
        uintptr_t free_slot = 0;
        if (atomic_compare_exchange_strong(&mapping[i].start, &free_slot, (uintptr_t)start)) {
            atomic_store(&mapping[i].lost, false);
            atomic_store(&mapping[i].end, (uintptr_t)start + bytes);
            return i;
        }
    }
    return -1;
}

void guest_memory_unwatch(int slot)
{
    if (slot < 0)
        return;
    if (atomic_exchange(&mapping[slot].lost, false))
        atomic_fetch_sub(&lost_mappings, 1);
    atomic_store(&mapping[slot].end, 0);
    atomic_store(&mapping[slot].start, 0);
}

static void on_sigbus(int signal_number, siginfo_t *info, void *context)
{
    uintptr_t at = (uintptr_t)info->si_addr;
    (void)context;
    for (int i = 0; i < SIGBUS_SLOTS; i++) {
        uintptr_t start = atomic_load(&mapping[i].start), end = atomic_load(&mapping[i].end);
        if (!start || at < start || at >= end)
            continue;
        /* The whole mapping at once: its attachment is over anyway. */
        if (mmap((void *)start, end - start, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED)
            break;
        if (!atomic_exchange(&mapping[i].lost, true))
            atomic_fetch_add(&lost_mappings, 1);
        return;
    }
    signal(signal_number, SIG_DFL); /* not ours: the access faults again and ends the process */
}

static void install_handler(void)
{
    struct sigaction sa = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};
    sigemptyset(&sa.sa_mask);
    sigaction(SIGBUS, &sa, NULL);
}

void guest_memory_catch_sigbus(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, install_handler);
}

bool guest_memory_watched_lost(int slot)
{
    return slot >= 0 && atomic_load_explicit(&lost_mappings, memory_order_relaxed) && atomic_load(&mapping[slot].lost);
}

bool guest_memory_lost(const struct guest_memory *m)
{
    if (atomic_load_explicit(&lost_mappings, memory_order_relaxed) == 0)
        return false;
    for (unsigned i = 0; i < m->current->count; i++)
        if (guest_memory_watched_lost(m->current->region[i]->sigbus_slot))
            return true;
    return false;
}

/* ---- regions ----------------------------------------------------------- */

static bool range_ok(uint64_t start, uint64_t bytes)
{
    return bytes > 0 && start <= UINT64_MAX - bytes;
}

static int region_map(const struct vs_region *r, struct mem_region **out)
{
    struct stat st;
    struct statfs fs;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), start, bytes;
    struct mem_region *region;
    if (!range_ok(r->guest_addr, r->bytes) || !range_ok(r->user_addr, r->bytes) || !range_ok(r->mmap_offset, r->bytes))
        return -EINVAL;
    if (fstat(r->fd, &st) < 0 || fstatfs(r->fd, &fs) < 0)
        return -errno;
    if (S_ISREG(st.st_mode) && r->mmap_offset + r->bytes > (uint64_t)st.st_size)
        return -EINVAL; /* would be SIGBUS at the first touch */
    if (fs.f_type == HUGETLBFS_MAGIC)
        page = (uint64_t)st.st_blksize; /* offset and length must be multiples of a huge page */
    start = r->mmap_offset & ~(page - 1);
    bytes = r->mmap_offset - start + r->bytes;
    if (bytes > UINT64_MAX - page)
        return -EINVAL;
    bytes = (bytes + page - 1) & ~(page - 1);
    region = calloc(1, sizeof *region);
    if (!region)
        return -ENOMEM;
    region->map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, r->fd, (off_t)start);
    if (region->map == MAP_FAILED) {
        int rc = -errno;
        free(region);
        return rc;
    }
    (void)madvise(region->map, bytes, MADV_DONTDUMP); /* a guest's memory is not for core files */
    region->map_bytes = bytes;
    region->host = (uint8_t *)region->map + (r->mmap_offset - start);
    region->guest_addr = r->guest_addr;
    region->user_addr = r->user_addr;
    region->bytes = r->bytes;
    region->sigbus_slot = guest_memory_watch(region->map, bytes);
    if (region->sigbus_slot < 0) { /* unwatched, the frontend could end this process by shrinking its file */
        munmap(region->map, bytes);
        free(region);
        return -ENOSPC;
    }
    *out = region;
    return 0;
}

static void region_unmap(struct guest_memory *m, struct mem_region *region)
{
    uint64_t token = region->gone_token;
    guest_memory_unwatch(region->sigbus_slot);
    munmap(region->map, region->map_bytes);
    free(region);
    m->regions--;
    if (token)
        m->gone(m, token);
}

/* ---- tables ------------------------------------------------------------ */

static void table_free(struct guest_memory *m, struct mem_table *t)
{
    for (unsigned i = 0; i < t->count; i++)
        if (--t->region[i]->tables == 0)
            region_unmap(m, t->region[i]);
    free(t);
}

struct mem_table *mem_table_pin(struct guest_memory *m)
{
    m->current->pins++;
    return m->current;
}

void mem_table_unpin(struct guest_memory *m, struct mem_table *t)
{
    if (--t->pins == 0)
        table_free(m, t);
}

static struct mem_table *table_new(const struct mem_table *from)
{
    struct mem_table *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    t->pins = 1;
    if (from) {
        t->count = from->count;
        memcpy(t->region, from->region, sizeof t->region);
        for (unsigned i = 0; i < t->count; i++)
            t->region[i]->tables++;
    }
    return t;
}

static void table_install(struct guest_memory *m, struct mem_table *t)
{
    struct mem_table *old = m->current;
    m->current = t;
    mem_table_unpin(m, old);
}

static int table_insert(struct guest_memory *m, struct mem_table *t, const struct vs_region *r)
{
    struct mem_region *region;
    unsigned at = 0;
    int rc;
    if (t->count == VS_MAX_MEM_SLOTS)
        return -ENOSPC;
    if (!range_ok(r->guest_addr, r->bytes))
        return -EINVAL;
    while (at < t->count && t->region[at]->guest_addr < r->guest_addr)
        at++;
    if ((at > 0 && t->region[at - 1]->guest_addr + t->region[at - 1]->bytes > r->guest_addr) ||
        (at < t->count && r->guest_addr + r->bytes > t->region[at]->guest_addr))
        return -EEXIST;
    rc = region_map(r, &region);
    if (rc < 0)
        return rc;
    m->regions++;
    region->tables = 1;
    memmove(&t->region[at + 1], &t->region[at], (t->count - at) * sizeof t->region[0]);
    t->region[at] = region;
    t->count++;
    return 0;
}

int guest_memory_init(struct guest_memory *m, void (*gone)(struct guest_memory *, uint64_t))
{
    *m = (struct guest_memory){.gone = gone, .current = table_new(NULL)};
    return m->current ? 0 : -ENOMEM;
}

void guest_memory_free(struct guest_memory *m)
{
    mem_table_unpin(m, m->current);
    m->current = NULL;
    assert(m->regions == 0);
}

int guest_memory_set(struct guest_memory *m, const struct vs_region *regions, unsigned count)
{
    struct mem_table *t = table_new(NULL);
    int rc = t ? 0 : -ENOMEM;
    for (unsigned i = 0; i < count; i++) {
        if (rc == 0)
            rc = table_insert(m, t, &regions[i]);
        close(regions[i].fd);
    }
    if (rc == 0)
        table_install(m, t);
    else if (t)
        table_free(m, t);
    return rc;
}

int guest_memory_add(struct guest_memory *m, const struct vs_region *region)
{
    struct mem_table *t = table_new(m->current);
    int rc = t ? table_insert(m, t, region) : -ENOMEM;
    close(region->fd);
    if (rc == 0)
        table_install(m, t);
    else if (t)
        table_free(m, t);
    return rc;
}

int guest_memory_remove(struct guest_memory *m, const struct vs_region *r, uint64_t token)
{
    struct mem_table *t;
    unsigned at = 0;
    if (r->fd >= 0)
        close(r->fd); /* frontends may send one with REM_MEM_REG; it means nothing */
    while (at < m->current->count && m->current->region[at]->guest_addr != r->guest_addr)
        at++;
    if (at == m->current->count || m->current->region[at]->bytes != r->bytes ||
        m->current->region[at]->user_addr != r->user_addr)
        return -ENOENT;
    t = table_new(m->current);
    if (!t)
        return -ENOMEM;
    struct mem_region *region = t->region[at];
    region->gone_token = token;
    region->tables--;
    t->count--;
    memmove(&t->region[at], &t->region[at + 1], (t->count - at) * sizeof t->region[0]);
    table_install(m, t); /* the old table still holds the region, until its last pin goes */
    return 0;
}

/* ---- translation ------------------------------------------------------- */

/* The last region that begins at or before addr. */
static const struct mem_region *region_of(const struct mem_table *t, uint64_t addr)
{
    unsigned low = 0, high = t->count;
    while (low < high) {
        unsigned mid = (low + high) / 2;
        if (t->region[mid]->guest_addr <= addr)
            low = mid + 1;
        else
            high = mid;
    }
    return low ? t->region[low - 1] : NULL;
}

void *guest_at(const struct mem_table *t, uint64_t addr, uint64_t bytes)
{
    const struct mem_region *r = region_of(t, addr);
    if (!r || bytes > r->bytes || addr - r->guest_addr > r->bytes - bytes)
        return NULL;
    return r->host + (addr - r->guest_addr);
}

uint64_t guest_addr_of(const struct mem_table *t, const void *host)
{
    const uint8_t *at = host;
    for (unsigned i = 0; i < t->count; i++) {
        const struct mem_region *r = t->region[i];
        if (at >= r->host && at < r->host + r->bytes)
            return r->guest_addr + (uint64_t)(at - r->host);
    }
    assert(!"outside the table that it was translated with");
    return UINT64_MAX;
}

void *guest_at_user(const struct mem_table *t, uint64_t user_addr, uint64_t bytes)
{
    for (unsigned i = 0; i < t->count; i++) {
        const struct mem_region *r = t->region[i];
        if (user_addr >= r->user_addr && bytes <= r->bytes && user_addr - r->user_addr <= r->bytes - bytes)
            return r->host + (user_addr - r->user_addr);
    }
    return NULL;
}

int guest_iov(const struct mem_table *t, uint64_t addr, uint64_t bytes, struct iovec *iov, int max)
{
    int count = 0;
    while (bytes > 0) {
        const struct mem_region *r = region_of(t, addr);
        uint64_t offset, here;
        if (!r || addr - r->guest_addr >= r->bytes)
            return 0;
        if (count == max)
            return -1;
        offset = addr - r->guest_addr;
        here = r->bytes - offset < bytes ? r->bytes - offset : bytes;
        iov[count].iov_base = r->host + offset;
        iov[count].iov_len = (size_t)here;
        count++;
        bytes -= here;
        addr += here; /* wraps only past the top of the last region, where bytes is 0 */
    }
    return count;
}
