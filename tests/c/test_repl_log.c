/* SPDX-License-Identifier: Apache-2.0 */
#include "repl_log.h"

#include <errno.h>

#include "harness.h"
#include "bounds.h"

static struct repl_log new_log(uint64_t bytes)
{
    struct repl_log log;
    CHECK_EQUAL(repl_log_init(&log, bytes), 0);
    return log;
}

static void sizes(void)
{
    struct repl_log log;
    CHECK_EQUAL(repl_log_init(&log, VS_REQUEST_BYTES_MAX - 1), -EINVAL); /* the largest request must fit */
    CHECK_EQUAL(repl_log_init(&log, UINT64_MAX), -EINVAL);
    log = new_log(VS_REQUEST_BYTES_MAX);
    struct log_entry *e = log_reserve(&log, LOG_WRITE, 0, VS_REQUEST_BYTES_MAX);
    CHECK(e);
    memset(e->data, 1, VS_REQUEST_BYTES_MAX);
    CHECK(!log_reserve(&log, LOG_WRITE, 0, 512));
    CHECK(log_reserve(&log, LOG_ZERO, 0, 1 << 28)); /* takes an entry and no room */
    log_abandon(&log, e);
    repl_log_free(&log);
}

/* The order is that of append, not of reserve; the prefix moves only past what is mirrored. */
static void order_and_prefix(void)
{
    struct repl_log log = new_log(VS_REQUEST_BYTES_MAX);
    struct log_entry *a = log_reserve(&log, LOG_WRITE, 0, 512), *b = log_reserve(&log, LOG_WRITE, 512, 1024);
    struct log_entry *c = log_reserve(&log, LOG_ZERO, 8192, 4096);
    CHECK(log_drained(&log) && !log_peek(&log));
    CHECK_EQUAL(log_mirrored_prefix(&log, 10), 10);
    log_append(&log, b, 11, 100);
    log_append(&log, a, 12, 101);
    log_append(&log, c, 14, 102); /* 13 had no entry */
    CHECK_EQUAL(log_lag_writes(&log), 3);
    CHECK_EQUAL(log.lag_bytes, 1024 + 512 + 4096);
    CHECK_EQUAL(log_oldest_ns(&log), 100);
    CHECK(log_peek(&log) == b);
    log_take(&log);
    CHECK(log_peek(&log) == a);
    log_take(&log);
    CHECK(log_peek(&log) == c);
    CHECK_EQUAL(log_mirrored_prefix(&log, 14), 10);
    log_mirrored(&log, a);
    CHECK_EQUAL(log_mirrored_prefix(&log, 14), 10); /* b is still to come */
    log_mirrored(&log, b);
    CHECK_EQUAL(log_mirrored_prefix(&log, 14), 13);
    CHECK_EQUAL(log_lag_writes(&log), 1);
    CHECK_EQUAL(log_oldest_ns(&log), 102);
    log_take(&log);
    log_mirrored(&log, c);
    CHECK(log_drained(&log));
    CHECK_EQUAL(log_mirrored_prefix(&log, 14), 14);
    CHECK_EQUAL(log.lag_bytes, 0);
    CHECK_EQUAL(ring_used(&log.ring), 0);
    repl_log_free(&log);
}

/* The destination is gone while some entries are on their way to it. */
static void dropped(void)
{
    struct repl_log log = new_log(VS_REQUEST_BYTES_MAX);
    struct log_entry *e[4];
    for (uint64_t i = 0; i < 4; i++) {
        e[i] = log_reserve(&log, LOG_WRITE, i * 4096, 4096);
        log_append(&log, e[i], i + 1, i);
    }
    log_take(&log);
    log_take(&log);
    log_drop_untaken(&log);
    CHECK(!log_peek(&log));
    CHECK(ring_used(&log.ring) > 0); /* buffers stay owned until the late completions */
    log_mirrored(&log, e[1]);
    log_mirrored(&log, e[0]);
    CHECK(log_drained(&log));
    CHECK_EQUAL(ring_used(&log.ring), 0);
    repl_log_free(&log);
}

/* Many rounds through a small log: contents arrive as captured, room is never lost. */
static void at_random(void)
{
    enum { IN_HAND = 300 };
    static struct log_entry *reserved[IN_HAND], *taken[IN_HAND];
    struct repl_log log = new_log(VS_REQUEST_BYTES_MAX);
    uint64_t state = 3, generation = 0, full = 0;
    int reserved_count = 0, taken_count = 0;
    for (int step = 0; step < 200000; step++) {
        uint64_t action = test_random(&state) % 4, i;
        struct log_entry *e;
        if (action == 0 && reserved_count < IN_HAND) {
            uint64_t length = 512 * (1 + test_random(&state) % 256);
            bool zero = test_random(&state) % 8 == 0;
            e = log_reserve(&log, zero ? LOG_ZERO : LOG_WRITE, test_random(&state) % 1000 * 512, length);
            if (!e) {
                full++;
                CHECK(reserved_count + taken_count > 0 || !log_drained(&log));
                continue;
            }
            if (!zero)
                e->data[0] = e->data[length - 1] = (uint8_t)e->offset;
            reserved[reserved_count++] = e;
        } else if (action == 1 && reserved_count > 0) {
            i = test_random(&state) % (uint64_t)reserved_count;
            e = reserved[i];
            reserved[i] = reserved[--reserved_count];
            if (test_random(&state) % 16 == 0)
                log_abandon(&log, e); /* the source write failed */
            else
                log_append(&log, e, ++generation, (uint64_t)step + 1);
        } else if (action == 2 && taken_count < IN_HAND && (e = log_peek(&log))) {
            log_take(&log);
            taken[taken_count++] = e;
        } else if (action == 3 && taken_count > 0) {
            i = test_random(&state) % (uint64_t)taken_count;
            e = taken[i];
            taken[i] = taken[--taken_count];
            CHECK(e->kind == LOG_ZERO ||
                  (e->data[0] == (uint8_t)e->offset && e->data[e->length - 1] == (uint8_t)e->offset));
            log_mirrored(&log, e);
        }
        /* Nothing taken and not mirrored lies at or below the prefix. */
        uint64_t prefix = log_mirrored_prefix(&log, generation);
        CHECK(prefix <= generation);
        for (int t = 0; t < taken_count; t++)
            CHECK(taken[t]->generation > prefix);
    }
    CHECK(full > 100 && generation > 10000);
    repl_log_free(&log);
}

int main(void)
{
    test("sizes", sizes);
    test("order and prefix", order_and_prefix);
    test("dropped", dropped);
    test("at random", at_random);
    return tests_end();
}
