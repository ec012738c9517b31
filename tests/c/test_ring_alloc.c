/* SPDX-License-Identifier: Apache-2.0 */
#include "ring_alloc.h"

#include <errno.h>

#include "harness.h"

#define UNIT 4096u

static void in_order(void)
{
    struct ring_alloc r;
    uint8_t *at[4], *more;
    int64_t slot[4];
    CHECK_EQUAL(ring_alloc_init(&r, 4 * UNIT, UNIT, 16), 0);
    for (int i = 0; i < 4; i++) {
        slot[i] = ring_take(&r, 1, &at[i]);
        CHECK_EQUAL(slot[i], i);
        CHECK_EQUAL(at[i] - r.base, (long)i * UNIT);
    }
    CHECK_EQUAL(ring_used(&r), 4 * UNIT);
    CHECK_EQUAL(ring_take(&r, 1, &more), -1);
    ring_give(&r, slot[1]); /* not the oldest: no room yet */
    CHECK_EQUAL(ring_take(&r, 1, &more), -1);
    ring_give(&r, slot[0]); /* now two */
    CHECK_EQUAL(ring_used(&r), 2 * UNIT);
    CHECK_EQUAL(ring_take(&r, 2 * UNIT, &more), 4);
    CHECK(more == r.base);
    ring_alloc_free(&r);
}

/* A piece that does not fit at the end goes to the start, and what it skipped comes back with it. */
static void skips_the_end(void)
{
    struct ring_alloc r;
    uint8_t *at;
    CHECK_EQUAL(ring_alloc_init(&r, 4 * UNIT, UNIT, 16), 0);
    int64_t a = ring_take(&r, 2 * UNIT, &at), b = ring_take(&r, UNIT, &at), c;
    ring_give(&r, a);
    c = ring_take(&r, 2 * UNIT, &at);
    CHECK(c >= 0 && at == r.base);
    CHECK_EQUAL(ring_used(&r), 4 * UNIT);
    ring_give(&r, b);
    CHECK_EQUAL(ring_used(&r), 3 * UNIT);
    ring_give(&r, c);
    CHECK_EQUAL(ring_used(&r), 0);
    CHECK(ring_take(&r, 4 * UNIT, &at) >= 0); /* all of it, in one piece */
    CHECK(at == r.base);
    ring_alloc_free(&r);
}

static void limits(void)
{
    struct ring_alloc r;
    uint8_t *at;
    CHECK_EQUAL(ring_alloc_init(&r, 3 * UNIT - 1, UNIT, 2), 0);
    CHECK_EQUAL(r.bytes, 3 * UNIT);
    CHECK_EQUAL(ring_take(&r, 3 * UNIT + 1, &at), -1);
    CHECK(ring_take(&r, 0, &at) >= 0); /* a slot alone */
    CHECK(ring_take(&r, 0, &at) >= 0);
    CHECK_EQUAL(ring_used(&r), 0);
    CHECK_EQUAL(ring_take(&r, 0, &at), -1); /* no slots left */
    ring_alloc_free(&r);
    CHECK_EQUAL(ring_alloc_init(&r, UINT64_MAX / 2, UNIT, 2), -ENOMEM);
}

/* Against a map of who owns which byte. */
static void at_random(void)
{
    enum { UNITS = 37, PIECES = 64 };
    struct ring_alloc r;
    static struct {
        int64_t slot; /* -1: free */
        uint8_t *at;
        uint64_t bytes;
    } piece[PIECES];
    uint64_t state = 7, live = 0, refused = 0;
    CHECK_EQUAL(ring_alloc_init(&r, UNITS * UNIT, UNIT, PIECES), 0);
    for (int i = 0; i < PIECES; i++)
        piece[i].slot = -1;
    for (int step = 0; step < 300000; step++) {
        int i = (int)(test_random(&state) % PIECES);
        if (piece[i].slot >= 0) {
            for (uint64_t b = 0; b < piece[i].bytes; b += UNIT)
                CHECK_EQUAL(piece[i].at[b], i);
            ring_give(&r, piece[i].slot);
            piece[i].slot = -1;
            live--;
        } else {
            uint64_t bytes = test_random(&state) % 8 ? test_random(&state) % (5 * UNIT) : test_random(&state) % r.bytes;
            piece[i].slot = ring_take(&r, bytes, &piece[i].at);
            piece[i].bytes = bytes;
            if (piece[i].slot < 0) {
                CHECK(live > 0); /* an empty ring has room for anything that fits it */
                refused++;
                continue;
            }
            live++;
            CHECK(piece[i].at >= r.base && piece[i].at + bytes <= r.base + r.bytes);
            CHECK_EQUAL((piece[i].at - r.base) % UNIT, 0);
            for (uint64_t b = 0; b < bytes; b += UNIT)
                piece[i].at[b] = (uint8_t)i; /* another's byte would be seen when that one is given back */
        }
        CHECK(ring_used(&r) <= r.bytes);
        CHECK(live > 0 || ring_used(&r) == 0);
    }
    CHECK(refused > 1000);
    ring_alloc_free(&r);
}

int main(void)
{
    test("room comes back in order", in_order);
    test("the end of the ring is skipped", skips_the_end);
    test("limits", limits);
    test("at random, nobody shares a byte", at_random);
    return tests_end();
}
