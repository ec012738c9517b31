/* SPDX-License-Identifier: Apache-2.0
 *
 * The I/O threads alone, with jobs that are no disks'. A wake-up that is lost
 * shows as a wait that nobody ends.
 */
#include "io_threads.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "held.h"
#include "list.h"
#include "patience.h"

#define JOBS 256u
/* Nobody else's: threads that the user has already count too. */
#define LONELY_UID 3141593u

static struct io_threads threads;
static int wake_fd, null_fd;

struct job {
    struct io_job io;
    bool in_ring;
    unsigned number, done;
};

/* ---- a ring that is small, and that refuses ------------------------------------- */

static atomic_bool small, refusing;

int __real_uring_init(struct uring *u, unsigned entries, unsigned cq_entries, const char **step);
int __wrap_uring_init(struct uring *u, unsigned entries, unsigned cq_entries, const char **step);

int __wrap_uring_init(struct uring *u, unsigned entries, unsigned cq_entries, const char **step)
{
    bool is_small = atomic_load(&small);
    return __real_uring_init(u, is_small ? 4 : entries, is_small ? 8 : cq_entries, step);
}

/* Every third call or so. */
static bool refuses(void)
{
    static _Thread_local uint64_t seed = 99;
    return atomic_load(&refusing) && test_random(&seed) % 3 == 0;
}

int __real_io_uring_submit(struct io_uring *ring);
int __real_io_uring_submit_and_wait(struct io_uring *ring, unsigned count);
int __real_io_uring_submit_and_get_events(struct io_uring *ring);
int __wrap_io_uring_submit(struct io_uring *ring);
int __wrap_io_uring_submit_and_wait(struct io_uring *ring, unsigned count);
int __wrap_io_uring_submit_and_get_events(struct io_uring *ring);

int __wrap_io_uring_submit(struct io_uring *ring)
{
    return refuses() ? -EAGAIN : __real_io_uring_submit(ring);
}

int __wrap_io_uring_submit_and_wait(struct io_uring *ring, unsigned count)
{
    if (atomic_load(&small))
        usleep(20); /* somebody may wake it between its last look and its sleep, with its completion queue full */
    return refuses() ? -ENOMEM : __real_io_uring_submit_and_wait(ring, count);
}

int __wrap_io_uring_submit_and_get_events(struct io_uring *ring)
{
    return refuses() ? -EBUSY : __real_io_uring_submit_and_get_events(ring);
}

/* ---- jobs -------------------------------------------------------------------------- */

static bool start(struct io_job *io, struct uring *uring, int *result)
{
    struct job *j = container_of(io, struct job, io);
    *result = 0;
    if (!j->in_ring)
        return true;
    struct io_uring_sqe *sqe = uring_sqe(uring, &io->op);
    io_uring_prep_read(sqe, null_fd, NULL, 0, 0); /* ends at once, with 0 */
    io_uring_sqe_set_data(sqe, &io->op);
    return false;
}

static void over(struct io_job *io)
{
    CHECK_EQUAL(io->result, 0);
    container_of(io, struct job, io)->done++;
}

static void begin_threads(unsigned count)
{
    const char *step = "";
    CHECK_EQUAL(io_threads_start(&threads, count, wake_fd, &step), 0);
}

/* As the data thread does it: hands out, sleeps if it may, takes back. */
static void turn(void)
{
    uint64_t counter;
    io_threads_wake(&threads);
    if (io_threads_may_sleep(&threads)) {
        if (!patience_readable(wake_fd))
            test_failed(__FILE__, __LINE__, "the data thread is woken");
        CHECK_EQUAL(read(wake_fd, &counter, sizeof counter), sizeof counter);
    }
    io_threads_awake(&threads);
    io_threads_take_back(&threads);
}

static void lend_one(struct job *j, uint64_t *seed)
{
    *j = (struct job){.io = {.start = start, .over = over}, .in_ring = test_random(seed) % 8};
    io_threads_lend(&threads, 1 + (unsigned)(test_random(seed) % (threads.count - 1)), &j->io);
}

/* Each job comes back once, however many are out, and whoever sleeps meanwhile. */
static void all_come_back(void)
{
    static struct job jobs[JOBS];
    uint64_t seed = 5, lent_before = threads.lent, lent = 0;
    for (unsigned round = 0; round < 1500; round++) {
        /* Mostly few: so both sides sleep time and again. More follow while they are out. */
        unsigned count = 1 + (unsigned)(test_random(&seed) % (test_random(&seed) % 16 ? 3 : JOBS - 8)), out = count;
        for (unsigned i = 0; i < count; i++)
            lend_one(&jobs[i], &seed);
        for (unsigned more = (unsigned)(test_random(&seed) % 8); out > 0;) {
            turn();
            if (more) {
                lend_one(&jobs[count++], &seed);
                more--;
            }
            out = 0;
            for (unsigned i = 0; i < count; i++)
                out += !jobs[i].done;
        }
        for (unsigned i = 0; i < count; i++)
            CHECK_EQUAL(jobs[i].done, 1);
        lent += count;
    }
    CHECK_EQUAL(threads.lent - lent_before, lent);
    CHECK(!io_threads_returned(&threads));
}

static void usual_rings(void)
{
    begin_threads(4);
    all_come_back();
    io_threads_stop(&threads);
}

/* Completion queues that overflow end the watch of the wake-ups too: it is begun again. */
static void small_rings_that_refuse(void)
{
    atomic_store(&small, true);
    begin_threads(3);
    all_come_back();
    atomic_store(&refusing, true);
    all_come_back();
    atomic_store(&refusing, false);
    atomic_store(&small, false);
    io_threads_stop(&threads);
}

/* ---- one that never runs out of jobs ------------------------------------------------- */

#define MANY 20000u

static atomic_uint handed_out;
static atomic_bool ending;

/* At its end there is a next one. */
static bool start_busy(struct io_job *io, struct uring *uring, int *result)
{
    struct job *j = container_of(io, struct job, io);
    (void)uring;
    *result = 0;
    while (atomic_load(&handed_out) <= j->number && !atomic_load(&ending))
        sched_yield();
    return true;
}

static void hand_out(struct job *j)
{
    j->number = atomic_load(&handed_out) + 1;
    j->io.start = start_busy;
    j->io.over = over;
    io_threads_lend(&threads, 1, &j->io);
    atomic_store(&handed_out, j->number);
}

/* A destination's writes go through the ring, while reads of a source in memory come without end. */
static void the_ring_has_its_turn(void)
{
    struct job patient = {.io = {.start = start, .over = over}, .in_ring = true};
    struct job busy[2] = {{.done = 0}};
    unsigned done[2] = {0};
    atomic_store(&handed_out, 0);
    atomic_store(&ending, false);
    begin_threads(2);
    io_threads_lend(&threads, 1, &patient.io);
    hand_out(&busy[0]);
    hand_out(&busy[1]);
    io_threads_wake(&threads);
    while (!patient.done && atomic_load(&handed_out) < MANY) {
        io_threads_take_back(&threads);
        for (unsigned i = 0; i < 2; i++) {
            if (busy[i].done == done[i])
                continue;
            done[i] = busy[i].done;
            hand_out(&busy[i]);
        }
        io_threads_wake(&threads);
    }
    CHECK(patient.done);
    atomic_store(&ending, true);
    while (busy[0].done == done[0] || busy[1].done == done[1])
        turn();
    io_threads_stop(&threads);
}

/* ---- what they hold ---------------------------------------------------------------------- */

static void begun_and_ended(void)
{
    struct held before = {0};
    for (int n = -10; n < leak_cycles(); n++) {
        struct job job = {.io = {.start = start, .over = over}, .in_ring = n % 2};
        if (n == 0)
            before = held_now(); /* what is kept and used again, the first ones have made */
        begin_threads(3);
        if (n % 3) {
            io_threads_lend(&threads, 1 + (unsigned)(n & 1), &job.io);
            while (!job.done)
                turn();
        }
        io_threads_stop(&threads);
    }
    held_check(&before);
}

/* The first, the second or the third thread lacks a descriptor, for its wake-ups or for its ring. */
static void begun_in_part(void)
{
    struct rlimit old, limit;
    unsigned failed = 0;
    int lowest_fd = dup(0), rc;
    CHECK(lowest_fd >= 0);
    close(lowest_fd);
    CHECK_EQUAL(getrlimit(RLIMIT_NOFILE, &old), 0);
    struct held before = held_now();
    do {
        const char *step = "";
        limit = old;
        limit.rlim_cur = (rlim_t)lowest_fd + failed;
        CHECK_EQUAL(setrlimit(RLIMIT_NOFILE, &limit), 0);
        rc = io_threads_start(&threads, 4, wake_fd, &step);
        CHECK_EQUAL(setrlimit(RLIMIT_NOFILE, &old), 0);
        if (rc == 0)
            break;
        CHECK_EQUAL(rc, -EMFILE);
        CHECK_EQUAL(strcmp(step, failed % 2 ? "io_uring_setup" : "eventfd"), 0);
        CHECK(threads.count == 1 && !threads.thread);
        held_check(&before);
        failed++;
    } while (failed < 64);
    CHECK_EQUAL(rc, 0);
    CHECK_EQUAL(failed, 6);
    io_threads_stop(&threads);
    held_check(&before);
}

/* 0: as it must be; 77: this cannot be found out here. */
static int without_a_thread_more(void)
{
    struct rlimit limit = {1, 1};
    const char *step = "";
    if (setrlimit(RLIMIT_NPROC, &limit) < 0 || setuid(LONELY_UID) < 0)
        return 77;
    int rc = io_threads_start(&threads, 3, wake_fd, &step);
    if (rc == 0)
        return 77;
    return rc == -EAGAIN && !strcmp(step, "pthread_create") && threads.count == 1 ? 0 : 1;
}

static void no_threads(void)
{
    int status;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0)
        _exit(without_a_thread_more());
    CHECK_EQUAL(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status));
    if (WEXITSTATUS(status) == 77)
        printf("# not looked at: this needs root\n");
    else
        CHECK_EQUAL(WEXITSTATUS(status), 0);
}

int main(void)
{
    wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    CHECK(wake_fd >= 0 && null_fd >= 0);
    test("a process without a thread more", no_threads); /* first: it forks */
    test("all come back", usual_rings);
    test("all come back through small rings that refuse", small_rings_that_refuse);
    test("the ring has its turn", the_ring_has_its_turn);
    test("begun and ended", begun_and_ended);
    test("begun in part", begun_in_part);
    close(wake_fd);
    close(null_fd);
    return tests_end();
}
