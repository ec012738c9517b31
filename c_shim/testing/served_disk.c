/* SPDX-License-Identifier: Apache-2.0
 *
 * A disk that another process has: each request goes over a socket and is
 * answered there, one after the other, by a thread of the disk's own. So it has
 * no descriptor that could be looked at, and a path on no file system. What a
 * request is on the socket: struct question, the data of a write; then struct
 * answer, the data of a read (tests/daemon/disk_server.py is the other end).
 *
 * Lost is lost: once the connection has failed, all requests fail. The one that was sent and not answered may be
 * carried out all the same.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "testing.h"

struct question {
    uint32_t kind; /* enum vs_disk_op, or VS_DISK_SIZE */
    uint32_t unused;
    uint64_t offset;
    uint64_t length;
};

struct answer {
    int32_t result; /* 0 or a negative errno */
    uint32_t unused;
    uint64_t size_bytes;
};

struct served_disk {
    struct vs_disk disk; /* first: the two share an address */
    int fd;
    bool lost;   /* the thread's */
    bool closed; /* or being closed by the thread, which ends with that */
    pthread_t thread;
    pthread_mutex_t lock; /* guards todo and ending */
    pthread_cond_t came;
    struct list todo; /* of disk_io, by work.remote_link */
    bool ending;
};

static bool send_all(int fd, const void *from, size_t bytes)
{
    for (const char *at = from; bytes;) {
        ssize_t n = send(fd, at, bytes, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        at += n;
        bytes -= (size_t)n;
    }
    return true;
}

static bool receive_all(int fd, void *to, size_t bytes)
{
    for (char *at = to; bytes;) {
        ssize_t n = recv(fd, at, bytes, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        at += n;
        bytes -= (size_t)n;
    }
    return true;
}

/* The whole request; of a part of one nothing is ever carried out. */
static bool send_request(const struct served_disk *s, const struct disk_io *io)
{
    struct question question = {.kind = io->kind, .offset = io->offset, .length = io->length};
    if (!send_all(s->fd, &question, sizeof question))
        return false;
    if (io->kind == VS_DISK_WRITE)
        for (int i = 0; i < io->iov_count; i++)
            if (!send_all(s->fd, io->iov[i].iov_base, io->iov[i].iov_len))
                return false;
    return true;
}

/* False: the connection is lost. */
static bool ask(const struct served_disk *s, struct disk_io *io, int *result)
{
    struct answer answer;
    if (!send_request(s, io))
        return false;
    io->work.unanswered = true;
    if (!receive_all(s->fd, &answer, sizeof answer) || answer.result > 0)
        return false;
    if (io->kind == VS_DISK_READ && answer.result == 0)
        for (int i = 0; i < io->iov_count; i++)
            if (!receive_all(s->fd, io->iov[i].iov_base, io->iov[i].iov_len))
                return false;
    io->work.unanswered = false;
    io->size_bytes = answer.size_bytes;
    *result = answer.result;
    return true;
}

static struct disk_io *take(struct served_disk *s)
{
    struct list *node;
    pthread_mutex_lock(&s->lock);
    while (!(node = list_pop(&s->todo)) && !s->ending)
        pthread_cond_wait(&s->came, &s->lock);
    pthread_mutex_unlock(&s->lock);
    return node ? container_of(node, struct disk_io, work.remote_link) : NULL;
}

static void *run(void *arg)
{
    struct served_disk *s = arg;
    struct disk_io *io;
    bool last = false;
    while (!last && (io = take(s))) {
        int result = 0;
        last = io->kind == VS_DISK_CLOSE;
        if (last)
            close(s->fd);
        else if (s->lost || !ask(s, io, &result)) {
            s->lost = true;
            result = -ENOTCONN;
        }
        disk_core->complete_remote(io, result); /* then *s may be gone, if it was the last */
    }
    return NULL;
}

static void served_submit(struct vs_disk *disk, struct disk_io *io)
{
    struct served_disk *s = (struct served_disk *)disk;
    if (io->kind == VS_DISK_CLOSE) {
        s->closed = true;
        pthread_detach(s->thread);
    }
    pthread_mutex_lock(&s->lock);
    list_append(&s->todo, &io->work.remote_link);
    pthread_cond_signal(&s->came);
    pthread_mutex_unlock(&s->lock);
}

static void served_cut_off(struct vs_disk *disk)
{
    struct served_disk *s = (struct served_disk *)disk;
    if (!s->closed)
        shutdown(s->fd, SHUT_RDWR); /* whoever waits for an answer is told */
}

static void served_close(struct vs_disk *disk)
{
    struct served_disk *s = (struct served_disk *)disk;
    if (!s->closed) {
        pthread_mutex_lock(&s->lock);
        s->ending = true;
        pthread_cond_signal(&s->came);
        pthread_mutex_unlock(&s->lock);
        pthread_join(s->thread, NULL);
        close(s->fd);
    }
    free(s);
}

vs_disk *vs_served_disk(int fd, uint64_t bytes, uint32_t block_bytes)
{
    static const struct disk_ops ops = {.submit = served_submit, .cut_off = served_cut_off, .close = served_close};
    struct served_disk *s = checked(calloc(1, sizeof *s));
    disk_core->init(&s->disk, &ops, bytes, block_bytes, 1, DISK_TELLS_SIZE | DISK_CLOSES_LATER | DISK_CAN_BE_CUT_OFF);
    s->fd = fd;
    list_init(&s->todo);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->came, NULL);
    if (pthread_create(&s->thread, NULL, run, s) != 0)
        abort();
    return &s->disk;
}
