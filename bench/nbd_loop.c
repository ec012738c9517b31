/* SPDX-License-Identifier: Apache-2.0
 *
 * nbd_loop URI SECONDS RAMP_SECONDS DEPTH BLOCK_BYTES FLUSH: random writes to an NBD export by libnbd and nothing
 * else, so many in flight; with FLUSH 1 each is followed by a flush before the next. One line of JSON: writes a
 * second, and the mean of their times (their flushes included) in microseconds. It is the limit beside which a
 * mirror to the same export is measured.
 */
#include <libnbd.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define DEPTH_MAX 256

struct request {
    char *data;
    uint64_t begun_ns;
    bool written; /* its flush may be issued: not from a callback, which holds the handle's lock */
    bool over;    /* it may be issued anew */
};

static struct nbd_handle *nbd;
static struct request requests[DEPTH_MAX];
static uint64_t blocks, state = 88172645463325252u;
static uint64_t counted, spent_ns;
static size_t block_bytes;
static bool flush_each, counting, failed;

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t random_block(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % blocks;
}

static int request_over(void *of, int *error)
{
    struct request *r = of;
    failed |= *error != 0;
    if (counting) {
        counted++;
        spent_ns += now_ns() - r->begun_ns;
    }
    r->over = true;
    return 1;
}

static int write_over(void *of, int *error)
{
    struct request *r = of;
    failed |= *error != 0;
    r->written = true;
    return 1;
}

static void issue_flush(struct request *r)
{
    nbd_completion_callback then = {.callback = request_over, .user_data = r};
    r->written = false;
    failed |= nbd_aio_flush(nbd, then, 0) < 0;
}

static void issue(struct request *r)
{
    nbd_completion_callback then = {.callback = flush_each ? write_over : request_over, .user_data = r};
    r->over = false;
    r->begun_ns = now_ns();
    failed |= nbd_aio_pwrite(nbd, r->data, block_bytes, random_block() * block_bytes, then, 0) < 0;
}

static void run_until(uint64_t end_ns, unsigned depth)
{
    while (!failed && now_ns() < end_ns) {
        for (unsigned i = 0; i < depth; i++) {
            if (requests[i].written)
                issue_flush(&requests[i]);
            if (requests[i].over)
                issue(&requests[i]);
        }
        failed |= nbd_poll(nbd, 100) < 0;
    }
}

int main(int count, char **words)
{
    if (count != 7) {
        fprintf(stderr, "usage: nbd_loop URI SECONDS RAMP_SECONDS DEPTH BLOCK_BYTES FLUSH\n");
        return 1;
    }
    double seconds = strtod(words[2], NULL), ramp = strtod(words[3], NULL);
    unsigned depth = (unsigned)strtoul(words[4], NULL, 10);
    block_bytes = strtoul(words[5], NULL, 10);
    flush_each = words[6][0] == '1';
    if (depth < 1 || depth > DEPTH_MAX || !block_bytes || seconds <= 0) {
        fprintf(stderr, "nbd_loop: 1 to %d in flight, blocks of at least a byte, for some time\n", DEPTH_MAX);
        return 1;
    }
    nbd = nbd_create();
    if (!nbd || nbd_set_uri_allow_local_file(nbd, true) < 0 || nbd_connect_uri(nbd, words[1]) < 0 ||
        (blocks = (uint64_t)nbd_get_size(nbd) / block_bytes) == 0) {
        fprintf(stderr, "nbd_loop: %s\n", nbd_get_error());
        return 1;
    }
    for (unsigned i = 0; i < depth; i++) {
        requests[i] = (struct request){.data = malloc(block_bytes), .over = true};
        if (!requests[i].data)
            return 1;
        memset(requests[i].data, (int)i + 1, block_bytes);
    }
    run_until(now_ns() + (uint64_t)(ramp * 1e9), depth);
    counting = true;
    uint64_t begun_ns = now_ns();
    run_until(begun_ns + (uint64_t)(seconds * 1e9), depth);
    double took_s = (double)(now_ns() - begun_ns) / 1e9;
    if (failed) {
        fprintf(stderr, "nbd_loop: a request failed: %s\n",
                nbd_get_error() ? nbd_get_error() : "an error of the server");
        return 1;
    }
    printf("{\"per_s\": %.1f, \"mean_us\": %.1f}\n", (double)counted / took_s,
           counted ? (double)spent_ns / (double)counted / 1000 : 0.0);
    counting = false;
    while (!failed && nbd_aio_in_flight(nbd) > 0)
        nbd_poll(nbd, 100);
    nbd_shutdown(nbd, 0);
    nbd_close(nbd);
    return 0;
}
