/* SPDX-License-Identifier: Apache-2.0
 *
 * Rings a bell: tells the frontend something through a descriptor of the frontend's, and never waits for it.
 *
 * A plain write could wait although we have set O_NONBLOCK. That flag belongs to the open file, which the frontend
 * shares: it can clear the flag between our look and our write. And pipes and sockets have locks, which whoever shares
 * them may hold as long as they like (by writing out of memory that never comes). So on the data thread
 *
 *   - an eventfd is never written to. The kernel signals it for us, as it does for its own purposes (eventfd_signal):
 *     that neither sleeps nor fails. Linux AIO offers it, as an operation that is over at once and is submitted with
 *     IOCB_FLAG_RESFD. It costs one system call, as a write would;
 *   - every other descriptor (and an eventfd where the kernel has no AIO) is written to by a worker of the ring. At
 *     most one write of a bell is under way. Invariant: after each ring of the bell a write begins. So a frontend that
 *     empties the descriptor and then looks at its ring misses nothing.
 *
 * Errors are ignored: EPIPE and the like say that the frontend is gone, which its socket tells as well.
 */
#include "bell.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

struct bell {
    struct uring_op op;
    struct list link; /* in bells.under_way */
    struct bells *bells;
    int fd;
    bool event_fd, again, taken_down;
    uint64_t one;
};

/* What user space sees of the context (fs/aio.c): completions are taken off without a system call. */
struct aio_ring {
    unsigned id, nr, head, tail, magic;
};

#define AIO_RING_MAGIC 0xa10a10a1u

static struct aio_ring *ring_of(const struct bells *b)
{
    return (struct aio_ring *)(uintptr_t)b->context;
}

void bells_init(struct bells *b)
{
    list_init(&b->under_way);
    b->null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (b->null_fd < 0 || syscall(SYS_io_setup, 1, &b->context) < 0)
        b->context = 0;
    else if (ring_of(b)->magic != AIO_RING_MAGIC) {
        syscall(SYS_io_destroy, b->context);
        b->context = 0;
    }
}

void bells_free(struct bells *b)
{
    struct list *node;
    if (!b->under_way.next)
        return;
    while ((node = list_pop(&b->under_way))) {
        struct bell *bell = container_of(node, struct bell, link);
        if (bell->taken_down) {
            close(bell->fd);
            free(bell);
        }
    }
    if (b->context)
        syscall(SYS_io_destroy, b->context);
    if (b->null_fd >= 0)
        close(b->null_fd);
}

bool is_event_fd(int fd)
{
    char path[32], target[32];
    ssize_t length;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    length = readlink(path, target, sizeof target - 1);
    if (length < 0)
        return false; /* then it is treated with more care than it needs */
    target[length] = 0;
    return strcmp(target, "anon_inode:[eventfd]") == 0;
}

/* A read of nothing, which is over at once. */
static bool signal_event_fd(struct bells *b, int fd)
{
    static uint8_t nothing;
    struct aio_ring *ring = ring_of(b);
    struct iocb read = {.aio_lio_opcode = IOCB_CMD_PREAD,
                        .aio_fildes = (uint32_t)b->null_fd,
                        .aio_buf = (uintptr_t)&nothing,
                        .aio_nbytes = 1,
                        .aio_flags = IOCB_FLAG_RESFD,
                        .aio_resfd = (uint32_t)fd};
    struct iocb *list = &read;
    if (syscall(SYS_io_submit, b->context, 1, &list) != 1)
        return false;
    __atomic_store_n(&ring->head, __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE), __ATOMIC_RELEASE);
    return true;
}

static void begin_write(struct bell *bell);

static void written(struct uring_op *op, int result, unsigned flags)
{
    struct bell *bell = container_of(op, struct bell, op);
    (void)result, (void)flags;
    bell->bells->outside--;
    list_remove(&bell->link);
    if (bell->taken_down) {
        close_foreign_fd(bell->bells, bell->fd);
        free(bell);
    } else if (bell->again) {
        begin_write(bell);
    }
}

static void begin_write(struct bell *bell)
{
    struct bells *b = bell->bells;
    struct io_uring_sqe *sqe = uring_sqe(b->uring, &bell->op);
    bell->again = false;
    io_uring_prep_write(sqe, bell->fd, &bell->one, sizeof bell->one, (uint64_t)-1);
    io_uring_sqe_set_data(sqe, &bell->op);
    io_uring_sqe_set_flags(sqe, IOSQE_ASYNC);
    list_append(&b->under_way, &bell->link);
    b->outside++;
}

void bell_ring(struct bell *bell)
{
    if (!bell || (bell->event_fd && bell->bells->context && signal_event_fd(bell->bells, bell->fd)))
        return;
    if (list_empty(&bell->link))
        begin_write(bell);
    else
        bell->again = true;
}

static void cancel(struct bell *bell)
{
    io_uring_prep_cancel(uring_sqe_detached(bell->bells->uring), &bell->op, 0);
}

static void take_down(struct bell *bell)
{
    bell->taken_down = true;
    if (!list_empty(&bell->link)) {
        cancel(bell); /* written() does the rest */
        return;
    }
    close_foreign_fd(bell->bells, bell->fd);
    free(bell);
}

void bell_hang(struct bells *b, struct bell **bell, int fd)
{
    if (*bell)
        take_down(*bell);
    *bell = fd >= 0 ? calloc(1, sizeof **bell) : NULL;
    if (fd >= 0 && !*bell)
        close_foreign_fd(b, fd);
    if (!*bell)
        return;
    **bell = (struct bell){.op.complete = written, .bells = b, .fd = fd, .event_fd = is_event_fd(fd), .one = 1};
    list_init(&(*bell)->link);
    if (!(*bell)->event_fd) /* frontends hand over blocking ones; a worker that sleeps in it is no good to anybody */
        (void)fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

void bells_cancel(struct bells *b)
{
    list_each(node, &b->under_way)
        cancel(container_of(node, struct bell, link));
}

static void closed(struct uring_op *op, int result, unsigned flags)
{
    struct bells *b = container_of(op, struct bells, closed);
    (void)result, (void)flags;
    b->outside--;
}

void close_foreign_fd(struct bells *b, int fd)
{
    struct io_uring_sqe *sqe;
    if (is_event_fd(fd) || !b->uring) {
        close(fd);
        return;
    }
    b->closed.complete = closed;
    sqe = uring_sqe(b->uring, &b->closed);
    io_uring_prep_close(sqe, fd);
    io_uring_sqe_set_data(sqe, &b->closed);
    io_uring_sqe_set_flags(sqe, IOSQE_ASYNC);
    b->outside++;
}
