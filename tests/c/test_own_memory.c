/* SPDX-License-Identifier: Apache-2.0 */
#include "own_memory.h"

#include <string.h>

#include "harness.h"

#define MIB (1ull << 20)

static bool all_are(const uint8_t *p, uint64_t bytes, uint8_t value)
{
    return p[0] == value && memcmp(p, p + 1, bytes - 1) == 0;
}

/* Where no huge page may begin, none is given, and the copy takes five times the processor time. */
static void begins_with_a_huge_page(void)
{
    for (uint64_t bytes = 4096; bytes <= 8 * MIB; bytes = bytes * 3 + 4096) {
        uint8_t *memory = own_memory_map(bytes);
        CHECK(memory && (uintptr_t)memory % (2 * MIB) == 0);
        memset(memory, 1, bytes);
        own_memory_unmap(memory, bytes);
    }
    own_memory_unmap(NULL, MIB);
    CHECK(!own_memory_map(UINT64_MAX - 4095));
    CHECK(!own_memory_map(1ull << 62));
}

static void what_was_dropped_reads_as_zeroes(void)
{
    uint8_t *memory = own_memory_map(4 * MIB);
    CHECK(all_are(memory, 4 * MIB, 0));
    memset(memory, 1, 4 * MIB);
    own_memory_drop(memory, 4 * MIB);
    CHECK(all_are(memory, 4 * MIB, 0));
    own_memory_unmap(memory, 4 * MIB);
}

int main(void)
{
    test("a huge page may begin where it begins", begins_with_a_huge_page);
    test("what was dropped reads as zeroes", what_was_dropped_reads_as_zeroes);
    return tests_end();
}
