/* SPDX-License-Identifier: Apache-2.0 */
#include "disk.h"

#include <errno.h>

#include "harness.h"

#define BYTES (1u << 20)
#define FROM 4096u
#define ASKED 65536u

static struct disk_host host;
static struct vs_disk disk;
static struct disk_io io;

static void disk_waits(struct vs_disk *waiting, struct disk_io *given)
{
    (void)waiting;
    (void)given;
}

static const struct disk_ops waiting_ops = {.submit = disk_waits};

static void over(struct disk_io *done)
{
    (void)done;
}

static void ask(uint32_t kind, uint32_t can)
{
    disk_init(&disk, &waiting_ops, BYTES, 512, 1, can);
    disk_adopt(&disk, &host);
    io.kind = kind;
    io.offset = FROM;
    io.length = ASKED;
    io.done = over;
    disk_submit(&disk, &io);
}

static void answer(int result, uint64_t data_at, uint64_t data_end)
{
    ask(VS_DISK_EXTENTS, DISK_TELLS_EXTENTS);
    io.data_at = data_at;
    io.data_end = data_end;
    disk_complete(&io, result);
    disk_run_done(&host);
}

static void all_is_data(void)
{
    CHECK_EQUAL(io.result, 0);
    CHECK_EQUAL(io.data_at, FROM);
    CHECK_EQUAL(io.data_end, FROM + ASKED);
    CHECK(!disk_found_hole(&io));
}

static void extents_that_can_be(void)
{
    answer(0, FROM + 512, FROM + 1024);
    CHECK_EQUAL(io.data_at, FROM + 512);
    CHECK_EQUAL(io.data_end, FROM + 1024);
    answer(0, FROM, FROM + 512);
    CHECK_EQUAL(io.data_end, FROM + 512);
    answer(0, FROM + ASKED, FROM + ASKED);
    CHECK(disk_found_hole(&io));
    answer(0, FROM + ASKED, FROM);
    CHECK(disk_found_hole(&io));
}

static void extents_that_cannot_be(void)
{
    answer(0, 0, FROM + ASKED);
    all_is_data();
    answer(0, FROM + ASKED + 512, FROM + ASKED + 512);
    all_is_data();
    answer(0, FROM, FROM); /* it would be asked for ever */
    all_is_data();
    answer(0, FROM, BYTES);
    all_is_data();
    answer(0, FROM + 1024, FROM + 512);
    all_is_data();
}

/* What is left of an earlier answer says that all of it is a hole. */
static void extents_that_could_not_be_found_out(void)
{
    answer(-EIO, FROM + ASKED, FROM + ASKED);
    all_is_data();
}

static void what_a_kind_leaves_out(void)
{
    ask(VS_DISK_EXTENTS, DISK_TELLS_SIZE | DISK_CLOSES_LATER);
    disk_run_done(&host);
    all_is_data();
    ask(VS_DISK_SIZE, DISK_TELLS_EXTENTS | DISK_CLOSES_LATER);
    disk_run_done(&host);
    CHECK_EQUAL(io.size_bytes, BYTES);
    ask(VS_DISK_CLOSE, DISK_TELLS_EXTENTS | DISK_TELLS_SIZE);
    CHECK_EQUAL(disk_run_done(&host), 1);
    CHECK_EQUAL(disk.stats.in_flight, 0);
}

int main(void)
{
    disk_host_init(&host, NULL, -1);
    test("extents that can be", extents_that_can_be);
    test("extents that cannot be", extents_that_cannot_be);
    test("extents that could not be found out", extents_that_could_not_be_found_out);
    test("what a kind leaves out", what_a_kind_leaves_out);
    disk_host_free(&host);
    return tests_end();
}
