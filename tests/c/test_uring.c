/* SPDX-License-Identifier: Apache-2.0
 *
 * A ring that is smaller than what is asked of it loses nothing, takes only
 * the operations that the engine has, and the data plane's own locks little
 * memory.
 */
#include "uring.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stddef.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "bounds.h"

#define OPERATIONS 1000
/* Nobody else's: what the user's other rings lock counts too. */
#define LONELY_UID 3141592u
#define LOCKED_BYTES (56u << 10)

struct operation {
    struct uring_op op;
    unsigned completed;
};

struct kick {
    struct uring_op op;
    struct uring *ring;
    int fd;
    unsigned seen, armed;
    bool over;
};

static struct operation operations[OPERATIONS];

static void completed(struct uring_op *op, int result, unsigned flags)
{
    CHECK_EQUAL(result, 0);
    (void)flags;
    ((struct operation *)op)->completed++;
}

static void arm(struct kick *k)
{
    struct io_uring_sqe *sqe = uring_sqe(k->ring, &k->op);
    io_uring_prep_poll_multishot(sqe, k->fd, POLLIN);
    io_uring_sqe_set_data(sqe, &k->op);
    k->armed++;
}

static void kicked(struct uring_op *op, int result, unsigned flags)
{
    struct kick *k = (struct kick *)op;
    uint64_t counter;
    k->seen++;
    k->over = !(flags & IORING_CQE_F_MORE);
    CHECK(result >= 0 || result == -ECANCELED);
    if (result == -ECANCELED)
        return;
    CHECK(read(k->fd, &counter, sizeof counter) == sizeof counter || errno == EAGAIN);
    if (k->over)
        arm(k);
}

/* All are begun before one completion is looked at, and a kick comes while there is no room for its completion. */
static void more_than_fits(void)
{
    struct uring ring;
    const char *step = "";
    uint64_t one = 1;
    struct kick k = {.op.complete = kicked, .ring = &ring, .fd = eventfd(0, EFD_NONBLOCK)};
    int null_fd = open("/dev/null", O_RDONLY);
    CHECK(k.fd >= 0 && null_fd >= 0);
    CHECK_EQUAL(uring_init(&ring, 16, 32, &step), 0);
    arm(&k);
    for (unsigned i = 0; i < OPERATIONS; i++) {
        operations[i] = (struct operation){.op.complete = completed};
        struct io_uring_sqe *sqe = uring_sqe(&ring, &operations[i].op);
        io_uring_prep_read(sqe, null_fd, NULL, 0, 0);
        io_uring_sqe_set_data(sqe, &operations[i].op);
    }
    CHECK(write(k.fd, &one, sizeof one) == sizeof one);
    for (unsigned tries = 0; (ring.in_flight > 1 || !k.seen) && tries < OPERATIONS; tries++) {
        uring_enter(&ring, 0);
        uring_reap(&ring);
    }
    for (unsigned i = 0; i < OPERATIONS; i++)
        CHECK_EQUAL(operations[i].completed, 1);
    CHECK(k.seen > 0);
    CHECK(write(k.fd, &one, sizeof one) == sizeof one);
    for (unsigned seen = k.seen; k.seen == seen;) {
        uring_enter(&ring, UINT64_MAX);
        uring_reap(&ring);
    }
    io_uring_prep_cancel(uring_sqe_detached(&ring), &k.op, 0);
    while (ring.in_flight) {
        uring_enter(&ring, UINT64_MAX);
        uring_reap(&ring);
    }
    CHECK(k.over);
    uring_free(&ring);
    close(k.fd);
    close(null_fd);
}

static int answer;

static void answered(struct uring_op *op, int result, unsigned flags)
{
    (void)op, (void)flags;
    answer = result;
}

static struct uring_op asked = {.complete = answered};

static int ask(struct uring *ring, struct io_uring_sqe *sqe)
{
    io_uring_sqe_set_data(sqe, &asked);
    answer = 1;
    while (ring->in_flight) {
        uring_enter(ring, UINT64_MAX);
        uring_reap(ring);
    }
    return answer;
}

/* What seccomp would deny, had it been asked for by a system call, and what opens more of the kernel. */
static void takes_nothing_else(void)
{
    struct uring ring;
    const char *step = "";
    struct io_uring_sqe *sqe;
    int fds[2], event_fd = eventfd(0, EFD_NONBLOCK);
    CHECK_EQUAL(uring_init(&ring, 16, 32, &step), 0);
    if (ring.unrestricted == -EPERM || ring.unrestricted == -ENOSYS) {
        printf("# not looked at: io_uring_register is forbidden here\n");
        goto out;
    }
    CHECK_EQUAL(ring.unrestricted, 0);
    CHECK_EQUAL(pipe(fds), 0);
    io_uring_prep_nop(sqe = uring_sqe(&ring, &asked));
    CHECK_EQUAL(ask(&ring, sqe), -EACCES);
    io_uring_prep_openat(sqe = uring_sqe(&ring, &asked), AT_FDCWD, "/dev/null", O_RDONLY, 0);
    CHECK_EQUAL(ask(&ring, sqe), -EACCES);
    io_uring_prep_connect(sqe = uring_sqe(&ring, &asked), fds[0], NULL, 0);
    CHECK_EQUAL(ask(&ring, sqe), -EACCES);
    io_uring_prep_splice(sqe = uring_sqe(&ring, &asked), fds[0], -1, fds[1], -1, 1, 0);
    CHECK_EQUAL(ask(&ring, sqe), -EACCES);
    io_uring_prep_unlink(sqe = uring_sqe(&ring, &asked), "/nonexistent", 0);
    CHECK_EQUAL(ask(&ring, sqe), -EACCES);
    io_uring_prep_write(sqe = uring_sqe(&ring, &asked), fds[1], "x", 1, 0);
    sqe->flags |= IOSQE_IO_DRAIN;
    CHECK_EQUAL(ask(&ring, sqe), -EACCES);
    io_uring_prep_write(sqe = uring_sqe(&ring, &asked), fds[1], "x", 1, 0);
    CHECK_EQUAL(ask(&ring, sqe), 1);
    CHECK_EQUAL(io_uring_register_eventfd(&ring.ring, event_fd), -EACCES);
    CHECK_EQUAL(io_uring_register_files(&ring.ring, fds, 2), -EACCES);
    close(fds[0]);
    close(fds[1]);
out:
    close(event_fd);
    uring_free(&ring);
}

/* 0: the ring could be made by a user who may lock so much; 77: this cannot be found out here. */
static int as_a_user(rlim_t locked_bytes)
{
    struct rlimit limit = {locked_bytes, locked_bytes};
    struct uring ring;
    const char *step = "";
    int rc;
    if (setrlimit(RLIMIT_MEMLOCK, &limit) < 0 || setuid(LONELY_UID) < 0)
        return 77;
    rc = uring_init(&ring, URING_ENTRIES, URING_CQ_ENTRIES, &step);
    if (rc < 0)
        return rc == -ENOMEM ? 1 : 77;
    uring_free(&ring);
    return 0;
}

static void locks_little(void)
{
    int status;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0)
        _exit(as_a_user(LOCKED_BYTES));
    CHECK_EQUAL(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status));
    if (WEXITSTATUS(status) == 77)
        printf("# not looked at: this needs root and io_uring for everybody\n");
    else
        CHECK_EQUAL(WEXITSTATUS(status), 0);
}

/* 0: the ring is there, and says that nothing restricts it. */
static int without_register(void)
{
    struct sock_filter deny[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_register, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof deny / sizeof deny[0], .filter = deny};
    struct uring ring;
    const char *step = "";
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0)
        return 1;
    if (uring_init(&ring, 16, 32, &step) < 0 || ring.unrestricted != -EPERM)
        return 2;
    io_uring_prep_nop(uring_sqe(&ring, &asked));
    uring_enter(&ring, UINT64_MAX);
    return io_uring_cq_ready(&ring.ring) == 1 ? 0 : 3;
}

/* As in a container that allows io_uring_setup and io_uring_enter alone. */
static void works_where_it_cannot_be_restricted(void)
{
    int status;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0)
        _exit(without_register());
    CHECK_EQUAL(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status));
    CHECK_EQUAL(WEXITSTATUS(status), 0);
}

int main(void)
{
    test("more than fits", more_than_fits);
    test("takes nothing else", takes_nothing_else);
    test("works where it cannot be restricted", works_where_it_cannot_be_restricted);
    test("what is locked", locks_little);
    return tests_end();
}
