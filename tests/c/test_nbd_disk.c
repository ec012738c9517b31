/* SPDX-License-Identifier: Apache-2.0
 *
 * A disk of an NBD server whose connection is lost, at moments that no real server can be had to choose: fake_nbd.h is
 * in place of libnbd, and the test is the engine as well as the server.
 */
#include "nbd_disk.h"

#include <sys/eventfd.h>

#include "fake_nbd.h"

#define BLOCK 4096

static struct disk_host host;
static vs_nbd *nbd;
static vs_disk *disk;
static struct nbd_handle *server;
static struct disk_io io[8];
static uint8_t data[BLOCK];
static struct iovec iov[8];
static unsigned done;

static void is_done(struct disk_io *which)
{
    (void)which;
    done++;
}

static vs_nbd *connected(void)
{
    struct vs_nbd_export found;
    char why[VS_NBD_WHY_BYTES];
    vs_nbd *made = vs_nbd_connect("nbd://fake", 1, 1000, &found, why);
    CHECK(made && found.bytes == FAKE_BYTES);
    return made;
}

static void begin_disk(void)
{
    done = 0;
    host = (struct disk_host){0};
    disk_host_init(&host, NULL, eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    nbd = connected();
    server = fake_newest;
    disk = vs_nbd_disk(nbd);
    CHECK(disk);
    disk_adopt(disk, &host);
}

/* As the engine does when it is woken; false: it was not, within that time. */
static bool woken(int timeout_ms)
{
    struct pollfd fds = {.fd = host.wake_fd, .events = POLLIN};
    uint64_t counter;
    if (poll(&fds, 1, timeout_ms) <= 0)
        return false;
    CHECK(read(host.wake_fd, &counter, sizeof counter) == sizeof counter);
    disk_run_done(&host);
    return true;
}

static void await_done(unsigned count)
{
    while (done < count)
        CHECK(woken(60000));
}

static void submit(unsigned number, uint32_t kind)
{
    iov[number] = (struct iovec){data, BLOCK};
    io[number] = (struct disk_io){.kind = kind, .done = is_done};
    if (kind != VS_DISK_FLUSH) {
        io[number].length = BLOCK;
        io[number].iov = &iov[number];
        io[number].iov_count = 1;
    }
    disk_submit(disk, &io[number]);
}

/* Submitted, sent as this command, and answered. */
static void carry_out(unsigned number, uint32_t kind, unsigned command)
{
    unsigned before = done;
    submit(number, kind);
    fake_await_sent(server, command + 1);
    fake_answer(server, command, 0);
    await_done(before + 1);
    CHECK_EQUAL(io[number].result, 0);
}

static void closed(struct disk_io *closing)
{
    disk_free(container_of(closing, struct vs_disk, closing));
    done++;
}

static void end_disk(void)
{
    unsigned before = done;
    disk_close_later(disk, closed, NULL);
    await_done(before + 1);
    vs_nbd_release(nbd);
    CHECK_EQUAL(fake_open, 0);
    close(host.wake_fd);
    disk_host_free(&host);
}

static enum vs_nbd_state lost_as(void)
{
    char why[VS_NBD_WHY_BYTES];
    return vs_nbd_await_loss(nbd, why);
}

/* ---- the engine hears of it ------------------------------------------------------------------- */

static void a_loss_while_nothing_is_under_way(void)
{
    begin_disk();
    carry_out(0, VS_DISK_READ, 0);
    CHECK(!disk->lost);
    fake_hang_up(server);
    CHECK(woken(60000));
    CHECK(disk->lost && done == 1);
    CHECK_EQUAL(lost_as(), VS_NBD_LOST);
    submit(1, VS_DISK_WRITE);
    await_done(2);
    CHECK(io[1].result == -ENOTCONN && !disk->unanswered); /* it was never sent */
    end_disk();
}

static void what_was_under_way_has_no_answer(void)
{
    begin_disk();
    submit(0, VS_DISK_WRITE);
    submit(1, VS_DISK_READ);
    fake_await_sent(server, 2);
    fake_hang_up(server);
    await_done(2);
    CHECK(io[0].result == -ENOTCONN && io[1].result == -ENOTCONN && disk->unanswered);
    end_disk();
}

/* ---- a guest's own disk ------------------------------------------------------------------------- */

/* It serves from here on: its first request comes behind the flush that makes durable what was there. */
static void serve(unsigned number, unsigned flush_command)
{
    disk_serve(disk, true);
    submit(number, VS_DISK_READ);
    fake_await_sent(server, flush_command + 2);
    CHECK_EQUAL(fake_sent(server, flush_command), FAKE_FLUSH);
    CHECK_EQUAL(fake_sent(server, flush_command + 1), FAKE_READ);
    fake_answer(server, flush_command + 1, 0);
}

static void is_held_once_nothing_can_be_forgotten(void)
{
    begin_disk();
    serve(0, 0);
    fake_answer(server, 0, 0);
    await_done(1);
    submit(1, VS_DISK_READ);
    fake_await_sent(server, 3);
    fake_hang_up(server);
    CHECK_EQUAL(lost_as(), VS_NBD_HELD);
    vs_nbd *fresh = connected();
    server = fake_newest;
    CHECK(vs_nbd_replace(nbd, fresh));
    vs_nbd_release(fresh);
    fake_await_sent(server, 1);
    CHECK_EQUAL(fake_sent(server, 0), FAKE_READ);
    fake_answer(server, 0, 0);
    await_done(2);
    CHECK(io[1].result == 0 && !disk->lost);
    end_disk();
}

/* The guest was there, went, wrote to the disk as a mirror's, which is not durable, and is back: the answer to the
 * flush of the first time says nothing of that. */
static void come_back(bool second_is_answered)
{
    begin_disk();
    serve(0, 0);
    disk_serve(disk, false);
    carry_out(1, VS_DISK_WRITE, 2);
    serve(2, 3);
    await_done(3);
    fake_answer(server, 0, 0);
    if (second_is_answered)
        fake_answer(server, 3, 0);
    fake_hang_up(server);
    CHECK_EQUAL(lost_as(), second_is_answered ? VS_NBD_HELD : VS_NBD_LOST);
    end_disk();
}

static void a_flush_of_an_earlier_time(void)
{
    come_back(false);
    come_back(true);
}

static void a_flush_that_failed(void)
{
    begin_disk();
    serve(0, 0);
    fake_answer(server, 0, EIO);
    await_done(1);
    fake_hang_up(server);
    CHECK_EQUAL(lost_as(), VS_NBD_LOST);
    end_disk();
}

/* ---- connections that come too late ---------------------------------------------------------------- */

static void one_that_comes_as_the_disk_is_closed(void)
{
    vs_nbd *held = connected(), *fresh = connected(), *later = connected();
    nbd_drop(held);
    nbd_tell(held, VS_NBD_HELD, "lost");
    CHECK(vs_nbd_replace(held, fresh));
    CHECK_EQUAL(fake_open, 2);
    nbd_end(held); /* the disk's thread has not looked since */
    CHECK_EQUAL(fake_open, 1);
    CHECK(!vs_nbd_replace(held, later));
    vs_nbd_close(later);
    CHECK_EQUAL(fake_open, 0);
    vs_nbd_release(held);
    vs_nbd_release(fresh);
    vs_nbd_release(later);
}

int main(void)
{
    CHECK(vs_nbd_begin(vs_disk_services()) == 0);
    test("a loss while nothing is under way", a_loss_while_nothing_is_under_way);
    test("what was under way has no answer", what_was_under_way_has_no_answer);
    test("a guest's disk is held once nothing can be forgotten", is_held_once_nothing_can_be_forgotten);
    test("a flush of an earlier time as the guest's disk", a_flush_of_an_earlier_time);
    test("a flush that failed", a_flush_that_failed);
    test("a connection that comes as the disk is closed", one_that_comes_as_the_disk_is_closed);
    return tests_end();
}
