/* SPDX-License-Identifier: Apache-2.0
 *
 * A fuzzer's input read as a row of choices. When it runs out every choice is
 * 0, so 0 must always be the plain, valid one.
 */
#ifndef VS_FUZZ_CHOICES_H
#define VS_FUZZ_CHOICES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct choices {
    const uint8_t *at;
    size_t left;
};

static inline uint64_t choose_raw(struct choices *c, size_t bytes)
{
    uint64_t value = 0;
    size_t n = bytes < c->left ? bytes : c->left;
    memcpy(&value, c->at, n);
    c->at += n;
    c->left -= n;
    return value;
}

/* 0 .. count-1 */
static inline unsigned choose(struct choices *c, unsigned count)
{
    return (unsigned)(choose_raw(c, count > 256 ? 2 : 1) % count);
}

/* A knob that is rarely turned: one input byte value in 32 says so. */
static inline bool rarely(struct choices *c)
{
    return (choose_raw(c, 1) & 31) == 31;
}

/* What is right, or rarely: something off by one, an edge, or anything. */
static inline uint64_t mostly(struct choices *c, uint64_t right)
{
    static const uint64_t edge[] = {0,          1,          0x7fff,     0x8000,    0xffff,     0x7fffffff,
                                    0x80000000, 0xffffffff, 1ull << 55, INT64_MAX, 1ull << 63, UINT64_MAX};
    if (!rarely(c))
        return right;
    switch (choose(c, 6)) {
    case 0:
        return right + 1;
    case 1:
        return right - 1;
    case 2:
        return edge[choose(c, sizeof edge / sizeof edge[0])];
    case 3:
        return right ^ (1ull << choose(c, 64));
    case 4:
        return right + choose_raw(c, 2);
    default:
        return choose_raw(c, 8);
    }
}

#endif
