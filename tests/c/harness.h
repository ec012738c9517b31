/* SPDX-License-Identifier: Apache-2.0
 *
 * A test program is a main() that calls test() for each of its tests. The
 * output is TAP; the first failed CHECK ends the program, since what follows
 * would stand on it.
 */
#ifndef VS_TEST_HARNESS_H
#define VS_TEST_HARNESS_H

#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int tests_run;
static const char *test_at_hand = "outside of any test";

#define CHECK(condition)                                 \
    do {                                                 \
        if (!(condition))                                \
            test_failed(__FILE__, __LINE__, #condition); \
    } while (0)

/* Integers of any kind; both are shown. */
#define CHECK_EQUAL(is, wanted)                                         \
    do {                                                                \
        long long is_ = (long long)(is), wanted_ = (long long)(wanted); \
        if (is_ != wanted_) {                                           \
            printf("# %s is %lld, not %lld\n", #is, is_, wanted_);      \
            test_failed(__FILE__, __LINE__, #is " == " #wanted);        \
        }                                                               \
    } while (0)

_Noreturn static inline void test_failed(const char *file, int line, const char *what)
{
    printf("not ok %d - %s\n# %s:%d: %s\n1..%d\n", tests_run + 1, test_at_hand, file, line, what, tests_run + 1);
    fflush(stdout);
    exit(1);
}

static inline void test(const char *name, void (*body)(void))
{
    test_at_hand = name;
    body();
    printf("ok %d - %s\n", ++tests_run, name);
    fflush(stdout);
}

static inline int tests_end(void)
{
    printf("1..%d\n", tests_run);
    return 0;
}

/* xorshift64*: the same numbers everywhere, from a seed. */
static inline uint64_t test_random(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1du;
}

#endif
