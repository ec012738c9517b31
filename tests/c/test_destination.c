/* SPDX-License-Identifier: Apache-2.0 */
#include "destination.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "harness.h"
#include "mailbox.h"

#define BYTES (1u << 20)

static struct mailbox mailbox;
static struct disk_host host;
static struct destination d;

/* A disk that completes nothing by itself. */
static struct vs_disk disks[2];
static int closed;

static void disk_waits(struct vs_disk *disk, struct disk_io *io)
{
    (void)disk;
    (void)io;
}

static void disk_closed(struct vs_disk *disk)
{
    (void)disk;
    closed++;
}

static int cuts;

static void disk_is_cut_off(struct vs_disk *disk)
{
    CHECK(disk == &disks[0]);
    cuts++;
}

static const struct disk_ops waiting_ops = {.submit = disk_waits, .cut_off = disk_is_cut_off, .close = disk_closed};

/* What was called, in this order. */
static unsigned calls, lost_call, done_call;
static uint32_t lost_reason;
static bool done_current;

static void lost(struct destination *destination, uint32_t reason, int error)
{
    CHECK(destination == &d && error < 0);
    lost_call = ++calls;
    lost_reason = reason;
    destination_give_up(destination);
}

static void done(struct destination_io *io, bool current)
{
    (void)io;
    done_call = ++calls;
    done_current = current;
}

static struct destination_io io;
static uint8_t buffer[4096];
static struct iovec iov = {buffer, sizeof buffer};

static void begin_destination(void)
{
    calls = lost_call = done_call = lost_reason = 0;
    closed = cuts = 0;
    destination_init(&d, &mailbox, lost);
    for (unsigned i = 0; i < 2; i++)
        disk_init(&disks[i], &waiting_ops, BYTES, 512, 1, 0);
    destination_attach(&d, &disks[0], &host);
}

static void start(uint32_t kind)
{
    io = (struct destination_io){.done = done};
    io.io.kind = kind;
    io.io.length = kind == VS_DISK_FLUSH ? 0 : sizeof buffer;
    io.io.iov = &iov;
    io.io.iov_count = 1;
    destination_submit(&d, &io);
}

static void complete(int result)
{
    disk_complete(&io.io, result);
    disk_run_done(&host);
}

/* How many events of this kind are posted. */
static unsigned events(uint32_t kind)
{
    struct vs_event event;
    unsigned count = 0;
    while (mailbox_next_event(&mailbox, &event))
        count += event.kind == kind;
    return count;
}

static void what_succeeds(void)
{
    begin_destination();
    start(VS_DISK_WRITE);
    complete(0);
    CHECK(done_call && done_current && !lost_call);
    CHECK_EQUAL(events(VS_EV_IO_ERROR), 0);
}

/* Reported, lost, and only then its caller hears. */
static void fails(uint32_t kind, uint32_t reason)
{
    begin_destination();
    start(kind);
    complete(-EIO);
    CHECK_EQUAL(lost_call, 1);
    CHECK_EQUAL(done_call, 2);
    CHECK_EQUAL(lost_reason, reason);
    CHECK(!done_current && !destination_attached(&d) && d.former == &disks[0]);
    CHECK_EQUAL(events(VS_EV_IO_ERROR), 1);
}

static void what_fails(void)
{
    fails(VS_DISK_WRITE, VS_REASON_DESTINATION_WRITE);
    fails(VS_DISK_ZERO, VS_REASON_DESTINATION_WRITE);
    fails(VS_DISK_FLUSH, VS_REASON_DESTINATION_FLUSH);
}

static void a_read_that_fails(void)
{
    begin_destination();
    start(VS_DISK_READ);
    complete(-EIO);
    CHECK(!lost_call && done_current && io.io.result == -EIO);
    CHECK_EQUAL(events(VS_EV_IO_ERROR), 1);
}

/* Reported too; but the destination that there is now has nothing to do with it. */
static void what_is_late(void)
{
    for (int result = -EIO; result <= 0; result += EIO) {
        begin_destination();
        start(VS_DISK_WRITE);
        destination_give_up(&d);
        complete(result);
        CHECK(!lost_call && done_call && !done_current);
        CHECK_EQUAL(events(VS_EV_IO_ERROR), result < 0);
    }
}

static void the_fence(void)
{
    begin_destination();
    start(VS_DISK_WRITE);
    destination_give_up(&d);
    complete(0);
    CHECK(d.former == &disks[0]);
    destination_close_former(&d);
    CHECK(d.former && events(VS_EV_FENCE_CLEAR) == 0);
    disk_run_done(&host);
    CHECK(!d.former);
    CHECK_EQUAL(closed, 1);
    CHECK_EQUAL(events(VS_EV_FENCE_CLEAR), 1);
    destination_attach(&d, &disks[1], &host);
    CHECK(destination_attached(&d));
}

/* The value of the first event of this kind. */
static uint64_t told(uint32_t kind)
{
    struct vs_event event;
    while (mailbox_next_event(&mailbox, &event))
        if (event.kind == kind)
            return event.value;
    return UINT64_MAX;
}

/* One that can be cut off is, once, and says whether a change may still be carried out; a read and a flush do no
 * harm. */
static void cut_off(uint32_t kind, uint64_t unanswered)
{
    begin_destination();
    disks[0].can = DISK_CAN_BE_CUT_OFF;
    host.now_ns = 5;
    start(kind);
    CHECK_EQUAL(destination_oldest_of_former_ns(&d), UINT64_MAX);
    destination_give_up(&d);
    CHECK_EQUAL(destination_oldest_of_former_ns(&d), 5);
    destination_cut_off_former(&d);
    CHECK_EQUAL(cuts, 1);
    CHECK_EQUAL(destination_oldest_of_former_ns(&d), UINT64_MAX);
    io.io.work.unanswered = true;
    complete(-ENOTCONN);
    destination_close_former(&d);
    disk_run_done(&host);
    CHECK_EQUAL(told(VS_EV_FENCE_CLEAR), unanswered);
}

static void what_is_cut_off(void)
{
    cut_off(VS_DISK_WRITE, 1);
    cut_off(VS_DISK_ZERO, 1);
    cut_off(VS_DISK_READ, 0);
    cut_off(VS_DISK_FLUSH, 0);
}

static void what_cannot_be_cut_off(void)
{
    begin_destination();
    start(VS_DISK_WRITE);
    destination_give_up(&d);
    CHECK_EQUAL(destination_oldest_of_former_ns(&d), UINT64_MAX);
    CHECK(!disk_cut_off(d.former) && cuts == 0);
    complete(-EIO);
    destination_close_former(&d);
    disk_run_done(&host);
    CHECK_EQUAL(told(VS_EV_FENCE_CLEAR), 0);
}

static void an_exchange(void)
{
    uint64_t epoch;
    begin_destination();
    disk_adopt(&disks[1], &host);
    epoch = d.epoch;
    CHECK(destination_exchange(&d, &disks[1]) == &disks[0]);
    CHECK(d.disk == &disks[1] && d.epoch == epoch);
    CHECK(destination_exchange(&d, NULL) == &disks[1]);
    CHECK(!destination_attached(&d) && !d.former && d.epoch != epoch);
}

int main(void)
{
    const char *step = "";
    int wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK_EQUAL(mailbox_init(&mailbox, &step), 0);
    disk_host_init(&host, NULL, wake_fd);
    test("what succeeds", what_succeeds);
    test("a write, a zeroing or a flush that fails", what_fails);
    test("a read that fails", a_read_that_fails);
    test("what completes late", what_is_late);
    test("the fence around a former one", the_fence);
    test("one that is cut off", what_is_cut_off);
    test("one that cannot be cut off", what_cannot_be_cut_off);
    test("an exchange", an_exchange);
    disk_host_free(&host);
    mailbox_free(&mailbox);
    close(wake_fd);
    return tests_end();
}
