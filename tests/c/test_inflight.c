/* SPDX-License-Identifier: Apache-2.0
 *
 * The record of requests in flight: a process that dies at any point between
 * two stores leaves a record from which the next one takes up exactly what was
 * not answered.
 */
#include "inflight.h"

#include <sys/mman.h>
#include <unistd.h>

#include "harness.h"

static struct inflight_ring ring;
static uint16_t heads[VS_MAX_QUEUE_SIZE];
static uint64_t counter;

static uint32_t recover(uint16_t used_idx)
{
    return inflight_recover(&ring, 8, used_idx, heads, &counter);
}

static void fresh(void)
{
    memset(&ring, 0, sizeof ring);
    CHECK_EQUAL(recover(65534), 0);
    CHECK_EQUAL(ring.version, INFLIGHT_VERSION);
    CHECK_EQUAL(ring.used_idx, 65534);
}

static void order_of_taking(void)
{
    fresh();
    inflight_taken(&ring, 5, counter++);
    inflight_taken(&ring, 1, counter++);
    inflight_taken(&ring, 3, counter++);
    CHECK_EQUAL(recover(65534), 3);
    CHECK_EQUAL(heads[0], 5);
    CHECK_EQUAL(heads[1], 1);
    CHECK_EQUAL(heads[2], 3);
    CHECK_EQUAL(counter, 3);
}

/* Answers of 1 and 5 as a batch of two; the process dies before or after the used index is shown, or while the
 * batch is being cleared. */
static void batch(bool shown, int cleared)
{
    order_of_taking();
    inflight_answered(&ring, 1);
    inflight_answered(&ring, 5);
    for (int i = 0; i < cleared; i++)
        ring.desc[i == 0 ? 5 : 1].inflight = 0;
    if (!shown) {
        CHECK_EQUAL(recover(65534), 3);
        return;
    }
    CHECK_EQUAL(recover(0), 1); /* 65534 + 2 */
    CHECK_EQUAL(heads[0], 3);
    CHECK_EQUAL(ring.used_idx, 0);
    CHECK_EQUAL(recover(0), 1); /* recovering twice (killed again) is the same */
}

static void batches(void)
{
    batch(false, 0);
    for (int cleared = 0; cleared <= 2; cleared++)
        batch(true, cleared);
    order_of_taking();
    inflight_answered(&ring, 1);
    inflight_batch_done(&ring, 1, 65535);
    inflight_answered(&ring, 3); /* not shown */
    CHECK_EQUAL(recover(65535), 2);
    CHECK_EQUAL(heads[0], 5);
    CHECK_EQUAL(heads[1], 3);
    inflight_answered(&ring, 5); /* a batch behind a stale one: the walk ends after its own */
    inflight_batch_done(&ring, 1, 0);
    CHECK_EQUAL(recover(0), 1);
    CHECK_EQUAL(heads[0], 3);
}

/* The frontend's memory may hold anything. */
static void rubbish(void)
{
    for (unsigned seed = 0; seed < 2000; seed++) {
        srand(seed);
        for (size_t i = 0; i < sizeof ring; i++)
            ((uint8_t *)&ring)[i] = (uint8_t)rand();
        ring.version = seed % 4 ? INFLIGHT_VERSION : ring.version;
        CHECK(recover((uint16_t)rand()) <= 8);
        for (uint32_t i = 0; i < recover((uint16_t)rand()); i++)
            CHECK(heads[i] < 8);
    }
}

static int area_of(struct inflight_area *a, uint64_t file_bytes, uint64_t bytes, uint64_t offset, uint32_t queues)
{
    int fd = memfd_create("inflight", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)file_bytes) == 0);
    return inflight_map(a, fd, bytes, offset, queues, false);
}

static struct inflight_ring *record_of(const struct inflight_area *a, uint32_t queue)
{
    return inflight_record(a, queue);
}

static void areas(void)
{
    struct inflight_area a = {.map = NULL};
    uint64_t two = 2ull * VS_INFLIGHT_RING_BYTES;
    CHECK(inflight_record(&a, 0) == NULL);
    CHECK_EQUAL(area_of(&a, two, two, 0, 2), 0);
    CHECK((uint8_t *)inflight_record(&a, 1) == a.base + VS_INFLIGHT_RING_BYTES);
    CHECK(inflight_record(&a, 2) == NULL);
    CHECK_EQUAL(area_of(&a, two + 64, two, 64, 2), 0); /* replaces the former one */
    record_of(&a, 1)->used_idx = 1;
    CHECK(area_of(&a, two, two, 64, 2) < 0); /* beyond the file */
    CHECK(a.map == NULL);
    CHECK(area_of(&a, two, two - 1, 0, 2) < 0);
    CHECK(area_of(&a, two, two, 0, 0) < 0);
    CHECK(area_of(&a, two, two, 0, VS_MAX_QUEUES + 1) < 0);
    CHECK(area_of(&a, two, two, UINT64_MAX - 4095, 2) < 0);
    inflight_unmap(&a);
}

/* Version and descriptors as another backend may have left them in the second ring's part. */
static int foreign(uint16_t version, uint16_t desc_num)
{
    struct inflight_area a = {.map = NULL};
    uint64_t two = 2ull * VS_INFLIGHT_RING_BYTES;
    int rc, fd = memfd_create("inflight", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)two) == 0);
    CHECK(pwrite(fd, &version, 2, VS_INFLIGHT_RING_BYTES + offsetof(struct inflight_ring, version)) == 2);
    CHECK(pwrite(fd, &desc_num, 2, VS_INFLIGHT_RING_BYTES + offsetof(struct inflight_ring, desc_num)) == 2);
    rc = inflight_map(&a, fd, two, 0, 2, false);
    CHECK((a.map != NULL) == (rc == 0));
    inflight_unmap(&a);
    return rc;
}

static void layouts(void)
{
    CHECK_EQUAL(foreign(0, 0), 0);
    CHECK_EQUAL(foreign(0, 7), 0); /* not begun: what else is there does not count */
    CHECK_EQUAL(foreign(INFLIGHT_VERSION, VS_MAX_QUEUE_SIZE), 0);
    CHECK(foreign(INFLIGHT_VERSION, 128) < 0);
    CHECK(foreign(INFLIGHT_VERSION + 1, VS_MAX_QUEUE_SIZE) < 0);
}

static void write_cache_mode(void)
{
    struct inflight_area a = {.map = NULL};
    bool mode = true;
    inflight_keep_write_cache(&a, false);
    inflight_write_cache(&a, &mode);
    CHECK(mode); /* there is no region */
    CHECK_EQUAL(area_of(&a, 2ull * VS_INFLIGHT_RING_BYTES, 2ull * VS_INFLIGHT_RING_BYTES, 0, 2), 0);
    inflight_write_cache(&a, &mode);
    CHECK(mode); /* nobody has said */
    inflight_keep_write_cache(&a, false);
    inflight_write_cache(&a, &mode);
    CHECK(!mode);
    record_of(&a, 0)->write_cache = 7;
    mode = true;
    inflight_write_cache(&a, &mode);
    CHECK(mode); /* rubbish */
    inflight_keep_write_cache(&a, true);
    mode = false;
    inflight_write_cache(&a, &mode);
    CHECK(mode);
    inflight_unmap(&a);
}

int main(void)
{
    test("a region that was not used yet", fresh);
    test("taken up again in the order of taking", order_of_taking);
    test("killed around a batch of answers", batches);
    test("a region of rubbish", rubbish);
    test("regions within their files", areas);
    test("another backend's layout", layouts);
    test("the write cache mode outlives a process", write_cache_mode);
    return tests_end();
}
