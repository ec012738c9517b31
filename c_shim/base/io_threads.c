/* SPDX-License-Identifier: Apache-2.0
 *
 * More than one thread (--threads N), and still one order.
 *
 * Theory of operation. What is decided about a request (its place in the
 * order, its range slot, the log, the counts, its ring) costs a few hundred
 * instructions, and all of it stays with the data thread: so there is no lock,
 * and no rule of durability.md depends on the number of threads. What costs
 * thousands is the disk: entering the kernel, its block layer, the copying of
 * cached data. That is lent to I/O threads, each with an io_uring of its own,
 * the queues spread over them.
 *
 *   data thread --todo--> I/O thread --done--> data thread
 *
 * Invariants:
 *   - A job belongs to the I/O thread from io_threads_lend() until it is taken
 *     back. Until then the data thread changes nothing that start() reads, and
 *     the I/O thread never changes anything but the job itself. The two
 *     channels order it: what was written before a job was put in is seen by
 *     whoever takes it out (release, acquire).
 *   - A channel never overflows: there are fewer jobs than places (bounds.h).
 *   - Neither side sleeps while there is something for it: it says that it is
 *     about to sleep, then looks once more; the other one puts a job in, then
 *     looks whether it sleeps. Each has a full fence between its two steps: a
 *     store may otherwise stay in its core's buffer past the look that follows
 *     it, even on x86. With both, one of the two sees the other; with either
 *     one missing, none may (tests/spin/threads.pml tries each).
 *   - A signal is no more than an end of sleep, so one that comes late or for
 *     nothing does no harm. It stays readable, so none is lost either while the
 *     kernel has ended the watch and it is not begun again.
 *   - A batch is one wake-up: of an I/O thread when the data thread has handed
 *     out what there was, of the data thread when the I/O thread has begun
 *     all of its batch (or WAKE_EARLY of those that are over at once).
 *   - What stands in a ring waits for no more than a batch of jobs that are done
 *     at once, though they come without end: a destination's requests are not
 *     starved by the guest's reads of cached data.
 */
#include "io_threads.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <semaphore.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "list.h"

#define WAKE_EARLY 16u
#define BATCH_MAX 64u

struct io_thread {
    struct io_channel todo, done;
    _Alignas(64) atomic_bool asleep;
    atomic_bool stop;
    atomic_ullong syscalls; /* its own writing */
    unsigned lent;          /* since the last wake-up: the data thread's */
    struct io_threads *all;
    pthread_t thread;
    int wake_fd;
    sem_t started;
    int start_result;
    const char *start_step;
    /* Its own. */
    struct uring uring;
    struct uring_op woken;
    uint64_t wakes;    /* of the data thread */
    unsigned finished; /* and the data thread was not looked after since */
};

/* ---- channels ------------------------------------------------------------ */

static void channel_put(struct io_channel *c, struct io_job *job)
{
    unsigned tail = atomic_load_explicit(&c->tail, memory_order_relaxed);
    assert(tail - atomic_load_explicit(&c->head, memory_order_acquire) < IO_CHANNEL_JOBS);
    c->job[tail % IO_CHANNEL_JOBS] = job;
    atomic_store_explicit(&c->tail, tail + 1, memory_order_release);
}

static struct io_job *channel_take(struct io_channel *c)
{
    unsigned head = atomic_load_explicit(&c->head, memory_order_relaxed);
    struct io_job *job;
    if (head == atomic_load_explicit(&c->tail, memory_order_acquire))
        return NULL;
    job = c->job[head % IO_CHANNEL_JOBS];
    atomic_store_explicit(&c->head, head + 1, memory_order_release);
    return job;
}

static bool channel_holds(const struct io_channel *c)
{
    return atomic_load_explicit(&c->head, memory_order_relaxed) != atomic_load_explicit(&c->tail, memory_order_acquire);
}

/* ---- sleeping and waking -------------------------------------------------- */

static void signal_fd(int fd)
{
    uint64_t one = 1;
    if (write(fd, &one, sizeof one) < 0)
        assert(errno == EAGAIN || errno == EINTR); /* the counter is full: it wakes anyway */
}

/* After jobs were put in: true once for each sleep that they must end. */
static bool must_wake(atomic_bool *asleep)
{
    atomic_thread_fence(memory_order_seq_cst); /* the job before the look */
    return atomic_load_explicit(asleep, memory_order_relaxed) &&
           atomic_exchange_explicit(asleep, false, memory_order_relaxed);
}

static void say_asleep(atomic_bool *asleep)
{
    atomic_store_explicit(asleep, true, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst); /* the word before the last look at the channel */
}

static void say_awake(atomic_bool *asleep)
{
    atomic_store_explicit(asleep, false, memory_order_relaxed);
}

/* ---- an I/O thread -------------------------------------------------------- */

static void show_syscalls(struct io_thread *t)
{
    atomic_store_explicit(&t->syscalls, t->uring.enters + t->wakes, memory_order_relaxed);
}

static void look_after_data_thread(struct io_thread *t)
{
    if (!t->finished)
        return;
    t->finished = 0;
    if (!must_wake(&t->all->asleep))
        return;
    signal_fd(t->all->wake_fd);
    t->wakes++;
}

static void give_back(struct io_job *job, int result)
{
    struct io_thread *t = job->thread;
    job->result = result;
    channel_put(&t->done, job);
    if (++t->finished >= WAKE_EARLY)
        look_after_data_thread(t);
}

static void completed(struct uring_op *op, int result, unsigned flags)
{
    (void)flags;
    give_back(container_of(op, struct io_job, op), result);
}

static void begin_batch(struct io_thread *t)
{
    struct io_job *job;
    for (unsigned n = 0; n < BATCH_MAX && (job = channel_take(&t->todo)); n++) {
        int result;
        job->op.complete = completed;
        if (job->start(job, &t->uring, &result))
            give_back(job, result);
    }
}

static void watch_wake_fd(struct io_thread *t)
{
    struct io_uring_sqe *sqe = uring_sqe(&t->uring, &t->woken);
    io_uring_prep_poll_multishot(sqe, t->wake_fd, POLLIN);
    io_uring_sqe_set_data(sqe, &t->woken);
}

/* Each signal is one completion, and nobody reads the counter: it would be one more system call a wake-up. */
static void woken(struct uring_op *op, int result, unsigned flags)
{
    struct io_thread *t = container_of(op, struct io_thread, woken);
    if (!(flags & IORING_CQE_F_MORE) && result != -ECANCELED)
        watch_wake_fd(t);
}

static bool may_sleep(struct io_thread *t)
{
    say_asleep(&t->asleep);
    if (!channel_holds(&t->todo) && !atomic_load_explicit(&t->stop, memory_order_acquire))
        return true;
    say_awake(&t->asleep);
    return false;
}

static void work(struct io_thread *t)
{
    while (!atomic_load_explicit(&t->stop, memory_order_acquire)) {
        bool sleeps;
        begin_batch(t);
        look_after_data_thread(t);
        sleeps = may_sleep(t);
        uring_enter(&t->uring, sleeps ? UINT64_MAX : 0);
        if (sleeps)
            say_awake(&t->asleep);
        uring_reap(&t->uring);
        show_syscalls(t);
    }
}

void io_thread_begin(const char *name)
{
    sigset_t all;
    pthread_setname_np(pthread_self(), name); /* from outside it would take a descriptor */
    /* Signals are the control plane's; a fault of ours is ours. */
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGSEGV);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
}

static void *run(void *arg)
{
    struct io_thread *t = arg;
    io_thread_begin("vhostsync-io");
    t->start_result = uring_init(&t->uring, IO_THREAD_ENTRIES, IO_THREAD_CQ_ENTRIES, &t->start_step);
    if (t->start_result < 0) {
        sem_post(&t->started);
        return NULL;
    }
    watch_wake_fd(t);
    sem_post(&t->started);
    work(t);
    uring_free(&t->uring);
    return NULL;
}

static int start_one(struct io_thread *t, const char **step)
{
    int rc;
    *step = "eventfd";
    t->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (t->wake_fd < 0)
        return -errno;
    t->woken.complete = woken;
    t->start_step = *step = "pthread_create";
    sem_init(&t->started, 0, 0);
    rc = -pthread_create(&t->thread, NULL, run, t);
    if (rc == 0) {
        while (sem_wait(&t->started) < 0)
            ;
        rc = t->start_result;
        *step = t->start_step;
        if (rc < 0)
            pthread_join(t->thread, NULL);
    }
    if (rc < 0) {
        sem_destroy(&t->started);
        close(t->wake_fd);
    }
    return rc;
}

/* ---- for the data thread --------------------------------------------------- */

int io_threads_start(struct io_threads *t, unsigned count, int wake_fd, const char **step)
{
    *t = (struct io_threads){.count = 1, .wake_fd = wake_fd};
    if (count <= 1)
        return 0;
    *step = "allocation of the I/O threads";
    t->thread = aligned_alloc(64, count * sizeof *t->thread);
    if (!t->thread)
        return -ENOMEM;
    memset(t->thread, 0, count * sizeof *t->thread);
    while (t->count < count) {
        t->thread[t->count].all = t;
        int rc = start_one(&t->thread[t->count], step);
        if (rc < 0) {
            io_threads_stop(t);
            return rc;
        }
        t->count++;
    }
    return 0;
}

void io_threads_stop(struct io_threads *t)
{
    for (unsigned i = 1; i < t->count; i++) {
        struct io_thread *one = &t->thread[i];
        atomic_store_explicit(&one->stop, true, memory_order_release);
        signal_fd(one->wake_fd);
        pthread_join(one->thread, NULL);
        sem_destroy(&one->started);
        close(one->wake_fd);
    }
    free(t->thread);
    t->thread = NULL;
    t->count = 1;
}

int io_threads_unrestricted(const struct io_threads *t)
{
    int found = 0;
    for (unsigned i = 1; i < t->count && !found; i++)
        found = t->thread[i].uring.unrestricted;
    return found;
}

uint64_t io_threads_syscalls(const struct io_threads *t)
{
    uint64_t sum = t->wakes;
    for (unsigned i = 1; i < t->count; i++)
        sum += atomic_load_explicit(&t->thread[i].syscalls, memory_order_relaxed);
    return sum;
}

void io_threads_lend(struct io_threads *t, unsigned number, struct io_job *job)
{
    struct io_thread *one = &t->thread[number];
    assert(number > 0 && number < t->count);
    job->thread = one;
    channel_put(&one->todo, job);
    one->lent++;
    t->lent++;
}

void io_threads_wake(struct io_threads *t)
{
    for (unsigned i = 1; i < t->count; i++) {
        struct io_thread *one = &t->thread[i];
        if (!one->lent)
            continue;
        one->lent = 0;
        if (!must_wake(&one->asleep))
            continue;
        signal_fd(one->wake_fd);
        t->wakes++;
    }
}

void io_threads_take_back(struct io_threads *t)
{
    struct io_job *job;
    for (unsigned i = 1; i < t->count; i++)
        while ((job = channel_take(&t->thread[i].done)))
            job->over(job);
}

bool io_threads_returned(const struct io_threads *t)
{
    for (unsigned i = 1; i < t->count; i++)
        if (channel_holds(&t->thread[i].done))
            return true;
    return false;
}

bool io_threads_may_sleep(struct io_threads *t)
{
    if (t->count == 1)
        return true;
    say_asleep(&t->asleep);
    if (!io_threads_returned(t))
        return true;
    say_awake(&t->asleep);
    return false;
}

void io_threads_awake(struct io_threads *t)
{
    if (t->count > 1)
        say_awake(&t->asleep);
}
