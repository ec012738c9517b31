/* SPDX-License-Identifier: Apache-2.0
 *
 * A destination over a network that nothing is asked of: when it is asked whether it is there, and what its answers
 * mean.
 */
#include "idle_probe.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "harness.h"
#include "mailbox.h"

#define BYTES (1u << 20)

static struct mailbox mailbox;
static struct disk_host host;
static struct destination d;
static struct idle_probe probe;
static struct guest_load load;

/* A disk that completes nothing by itself. */
static struct vs_disk disk;
static struct disk_io *asked;

static void disk_waits(struct vs_disk *of, struct disk_io *io)
{
    CHECK(of == &disk && !asked);
    asked = io;
}

static const struct disk_ops waiting_ops = {.submit = disk_waits};

static uint32_t lost_reason;
static int lost_error;

static void lost(struct destination *destination, uint32_t reason, int error)
{
    CHECK(destination == &d);
    lost_reason = reason;
    lost_error = error;
    destination_give_up(&d);
    idle_probe_begin(&probe);
}

static void begin_idle(uint32_t can)
{
    asked = NULL;
    lost_error = 0;
    load = (struct guest_load){0};
    host.now_ns = 1000;
    destination_init(&d, &mailbox, lost);
    disk_init(&disk, &waiting_ops, BYTES, 512, 1, can);
    destination_attach(&d, &disk, &host);
    idle_probe_init(&probe, &(struct idle_probe_rooms){.destination = &d, .load = &load, .host = &host});
    idle_probe_begin(&probe);
}

static void answer(struct disk_io *io, int result)
{
    asked = NULL;
    disk_complete(io, result);
    disk_run_done(&host);
}

/* The engine sleeps until then. */
static void sleep_until_it_looks(void)
{
    const struct disk_io *before = asked;
    CHECK(idle_probe_deadline_ns(&probe) != UINT64_MAX);
    host.now_ns = idle_probe_deadline_ns(&probe) - 1;
    idle_probe_pump(&probe);
    CHECK(asked == before);
    host.now_ns++;
    idle_probe_pump(&probe);
    CHECK(idle_probe_deadline_ns(&probe) > host.now_ns);
}

static void one_that_is_far(void)
{
    begin_idle(DISK_IS_FAR);
    for (int times = 0; times < 3; times++) {
        sleep_until_it_looks();
        CHECK(asked && asked->kind == VS_DISK_READ);
        CHECK_EQUAL(asked->length, 512);
        CHECK_EQUAL(host.now_ns, 1000 + (uint64_t)(times + 1) * IDLE_PROBE_NS);
        answer(asked, 0);
    }
    CHECK(!lost_error);
}

static void one_that_is_here_or_gone(void)
{
    begin_idle(0);
    CHECK_EQUAL(idle_probe_deadline_ns(&probe), -1);
    begin_idle(DISK_IS_FAR);
    destination_give_up(&d);
    idle_probe_begin(&probe);
    CHECK_EQUAL(idle_probe_deadline_ns(&probe), -1);
    host.now_ns = -1ull;
    idle_probe_pump(&probe);
    CHECK(!asked);
}

static struct destination_io io;

static void other_answered(struct destination_io *of, bool current)
{
    CHECK(of == &io && current);
}

static void submit_a_flush(void)
{
    io = (struct destination_io){.done = other_answered, .io = {.kind = VS_DISK_FLUSH}};
    destination_submit(&d, &io);
}

/* It has just shown that it is there. */
static void one_that_is_at_work(void)
{
    begin_idle(DISK_IS_FAR);
    submit_a_flush();
    answer(asked, 0);
    sleep_until_it_looks();
    CHECK(!asked);
    submit_a_flush();
    sleep_until_it_looks();
    CHECK(asked == &io.io); /* it has its own time */
    answer(asked, 0);
    sleep_until_it_looks();
    CHECK(!asked);
    sleep_until_it_looks();
    CHECK(asked);
    answer(asked, 0);
}

static void while_a_switch_holds_the_guest(void)
{
    begin_idle(DISK_IS_FAR);
    load.holds = GUEST_HOLD_SWITCH;
    sleep_until_it_looks();
    CHECK(!asked);
    load.holds = 0;
    sleep_until_it_looks();
    CHECK(asked);
    answer(asked, 0);
}

static void what_it_does_not_answer(void)
{
    begin_idle(DISK_IS_FAR);
    sleep_until_it_looks();
    CHECK_EQUAL(disk_oldest_ns(&disk), host.now_ns); /* what is given up after its time (mirror.c) */
    struct disk_io *first = asked;
    asked = NULL;
    sleep_until_it_looks();
    CHECK(!asked);
    destination_give_up(&d);
    idle_probe_begin(&probe);
    answer(first, -ENOTCONN); /* it is the former one's */
    CHECK(!lost_error);
}

static void what_it_answers(void)
{
    static const int losses[] = {-ENOTCONN, -ESHUTDOWN, -ETIMEDOUT};
    for (unsigned i = 0; i < 3; i++) {
        begin_idle(DISK_IS_FAR);
        sleep_until_it_looks();
        answer(asked, losses[i]);
        CHECK_EQUAL(lost_error, losses[i]);
        CHECK_EQUAL(lost_reason, VS_REASON_DESTINATION_LOST);
        CHECK_EQUAL(idle_probe_deadline_ns(&probe), -1);
    }
    begin_idle(DISK_IS_FAR);
    sleep_until_it_looks();
    answer(asked, -EIO); /* a bad block says that the disk is there */
    CHECK(!lost_error && destination_attached(&d));
    CHECK_EQUAL(idle_probe_deadline_ns(&probe), host.now_ns + IDLE_PROBE_AFTER_ERROR_NS);
    sleep_until_it_looks();
    CHECK(asked);
    answer(asked, 0);
}

int main(void)
{
    const char *step;
    CHECK(mailbox_init(&mailbox, &step) == 0);
    disk_host_init(&host, NULL, mailbox.wake_fd);
    test("one that is far is asked now and then", one_that_is_far);
    test("one that is here, or gone, is not", one_that_is_here_or_gone);
    test("nor one that is at work", one_that_is_at_work);
    test("nor while a switch holds the guest", while_a_switch_holds_the_guest);
    test("what it does not answer is a request like any other", what_it_does_not_answer);
    test("what it answers", what_it_answers);
    disk_host_free(&host);
    mailbox_free(&mailbox);
    return tests_end();
}
