/* SPDX-License-Identifier: Apache-2.0
 *
 * Large buffers are mapped here, and laid so that the kernel can use huge pages for them. See own_memory.h.
 */
#include "own_memory.h"

#include <assert.h>
#include <stddef.h>
#include <sys/mman.h>

#define HUGE_PAGE_BYTES (2ull << 20)

/* Where a huge page may begin, and no more of it than is needed. */
static uint8_t *map_aligned(uint64_t bytes)
{
    uint64_t room = bytes + HUGE_PAGE_BYTES;
    uint8_t *start, *aligned;
    assert(bytes % 4096 == 0);
    if (room < bytes)
        return NULL;
    start = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
    aligned = start + (-(uintptr_t)start & (HUGE_PAGE_BYTES - 1));
    if (aligned > start)
        munmap(start, (size_t)(aligned - start));
    munmap(aligned + bytes, (size_t)(start + room - (aligned + bytes)));
    return aligned;
}

uint8_t *own_memory_map(uint64_t bytes)
{
    uint8_t *memory = map_aligned(bytes);
    if (!memory)
        return NULL;
    /* A guest's data is not for core files. */
    (void)madvise(memory, bytes, MADV_DONTDUMP);
    /* Direct I/O then pins and maps 2 MiB at once, not each 4 KiB. A kernel without them goes on with small ones. */
    (void)madvise(memory, bytes, MADV_HUGEPAGE);
    return memory;
}

void own_memory_unmap(uint8_t *memory, uint64_t bytes)
{
    if (memory)
        munmap(memory, bytes);
}

void own_memory_drop(uint8_t *memory, uint64_t bytes)
{
    (void)madvise(memory, bytes, MADV_DONTNEED);
}
