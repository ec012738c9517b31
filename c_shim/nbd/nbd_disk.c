/* SPDX-License-Identifier: Apache-2.0
 *
 * A disk that an NBD server has, by libnbd, whose own calls on the socket (and all of TLS) are made on a thread of the
 * disk's own. The data thread hands operations over in a list; the thread takes all that are there, submits them, and
 * gives back in one go what one look at the sockets has brought. Neither allocates; libnbd does, for each command.
 *
 * An operation is one command, or several, one after the other, where it is more than the server takes at once: then
 * the data thread submits it again for the rest (DISK_GO_ON), which is also how it sees that a long zeroing
 * comes on.
 *
 * Lost is lost: when one connection is, all are closed, and whatever is under way or comes later fails with ENOTCONN.
 * What was under way the server may still carry out, also after another connection began: it is "unanswered".
 *
 * A buffer goes to libnbd as it is, so it has to be one piece (DISK_ONE_BUFFER): no copy is made here. The commands are
 * in nbd_command.c.
 */
#include "nbd_disk.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* Read from one connection before the others, and the data thread, have their turn. */
#define ANSWERS_AT_ONCE 64

/* ---- the end of a connection ------------------------------------------------------------ */

/* What libnbd has given up has an error by then; the rest is still under way. Neither has an answer. */
static void lose(struct nbd_disk *d, const char *why)
{
    if (d->lost)
        return;
    d->lost = d->disk.lost = true;
    nbd_tell_end(d->nbd, why);
    nbd_drop(d->nbd);
    list_each(node, &d->over) {
        struct disk_io *io = nbd_io_at(node);
        io->work.unanswered = io->result == -ENOTCONN || io->result == -ESHUTDOWN;
        io->result = io->work.unanswered ? -ENOTCONN : io->result;
    }
    while (!list_empty(&d->under_way)) {
        struct disk_io *io = nbd_io_at(d->under_way.next);
        io->work.unanswered = true;
        nbd_fail(d, io, -ENOTCONN);
    }
}

/* ---- the thread -------------------------------------------------------------------------- */

static void issue(struct nbd_disk *d, struct disk_io *io)
{
    list_append(&d->under_way, &io->work.remote_link);
    if (d->lost)
        nbd_fail(d, io, -ENOTCONN);
    else
        nbd_command(d, io);
}

/* What was handed over since. True: the thread is to end. */
static bool take(struct nbd_disk *d)
{
    struct list handed_over, *node;
    bool cut_off, ending;
    list_init(&handed_over);
    pthread_mutex_lock(&d->lock);
    d->asleep = false;
    list_splice(&handed_over, &d->todo);
    cut_off = d->cut_off;
    ending = d->ending;
    pthread_mutex_unlock(&d->lock);
    while ((node = list_pop(&handed_over))) {
        struct disk_io *io = nbd_io_at(node);
        if (io->kind == VS_DISK_CLOSE)
            d->closing = io;
        else
            issue(d, io);
    }
    if (cut_off)
        lose(d, "the server does not answer in time");
    return ending || d->closing;
}

/* About to sleep: false, there is something to do. */
static bool may_sleep(struct nbd_disk *d)
{
    bool asleep;
    pthread_mutex_lock(&d->lock);
    asleep = d->asleep = list_empty(&d->todo) && !d->ending && (d->lost || !d->cut_off);
    pthread_mutex_unlock(&d->lock);
    return asleep;
}

/* All that is there. Only what the socket says counts: libnbd, told to read where there is nothing, would leave what it
 * is sending for an answer that cannot come before. A handle's direction changes with each call. */
static void serve_socket(struct nbd_disk *d, struct nbd_handle *handle, short events)
{
    struct pollfd again = {.fd = nbd_aio_get_fd(handle), .revents = events};
    int told = 0;
    for (unsigned n = 0; again.revents && n < ANSWERS_AT_ONCE && !nbd_is_lost(handle); n++) {
        unsigned direction = nbd_aio_get_direction(handle);
        if (again.revents & ~POLLOUT && direction & LIBNBD_AIO_DIRECTION_READ)
            told = nbd_aio_notify_read(handle);
        else if (direction & LIBNBD_AIO_DIRECTION_WRITE)
            told = nbd_aio_notify_write(handle);
        if (told < 0 && nbd_get_error())
            snprintf(d->why, sizeof d->why, "%s", nbd_get_error());
        again.events = POLLIN;
        if (poll(&again, 1, 0) < 0)
            return;
    }
}

/* Sleeps until a socket, or the data thread, has something. */
static void look_around(struct nbd_disk *d)
{
    struct pollfd fds[VS_NBD_CONNECTIONS_MAX + 1];
    uint32_t count = d->nbd->connections;
    uint64_t counter;
    for (uint32_t i = 0; i < count; i++) {
        unsigned direction = nbd_aio_get_direction(d->nbd->handle[i]);
        fds[i] = (struct pollfd){.fd = nbd_aio_get_fd(d->nbd->handle[i])};
        fds[i].events |= direction & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0;
        fds[i].events |= direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0;
    }
    fds[count] = (struct pollfd){.fd = d->wake_fd, .events = POLLIN};
    if (poll(fds, count + 1, may_sleep(d) ? -1 : 0) <= 0)
        return;
    if (fds[count].revents && read(d->wake_fd, &counter, sizeof counter) < 0 && errno != EAGAIN && errno != EINTR)
        abort();
    for (uint32_t i = 0; i < count; i++)
        if (fds[i].revents)
            serve_socket(d, d->nbd->handle[i], fds[i].revents);
    if (nbd_any_lost(d))
        lose(d, d->why[0] ? d->why : "the server has ended the connection");
}

static void give_back(struct nbd_disk *d)
{
    if (!list_empty(&d->over))
        nbd_core->complete_remote_all(d->disk.host, &d->over);
}

static void *run(void *arg)
{
    struct nbd_disk *d = arg;
    bool end = false;
    nbd_core->thread_begin("vhostsync-nbd");
    while (!end) {
        look_around(d);
        end = take(d);
        give_back(d);
    }
    nbd_say_goodbye(d->nbd);
    nbd_tell_end(d->nbd, NULL);
    if (d->closing)
        nbd_core->complete_remote(d->closing, 0); /* then *d may be gone */
    return NULL;
}

/* ---- the data thread's side --------------------------------------------------------------- */

static void wake(struct nbd_disk *d)
{
    uint64_t one = 1;
    if (write(d->wake_fd, &one, sizeof one) < 0 && errno != EAGAIN && errno != EINTR)
        abort();
}

static void nbd_submit(struct vs_disk *disk, struct disk_io *io)
{
    struct nbd_disk *d = (struct nbd_disk *)disk;
    bool asleep;
    if (io->kind == VS_DISK_ZERO)
        nbd_plan_zero(d, io);
    if (io->kind == VS_DISK_CLOSE) {
        d->closed = true;
        pthread_detach(d->thread);
    }
    pthread_mutex_lock(&d->lock);
    list_append(&d->todo, &io->work.remote_link);
    asleep = d->asleep;
    d->asleep = false;
    pthread_mutex_unlock(&d->lock);
    if (asleep)
        wake(d);
}

static void nbd_cut_off(struct vs_disk *disk)
{
    struct nbd_disk *d = (struct nbd_disk *)disk;
    pthread_mutex_lock(&d->lock);
    d->cut_off = true;
    pthread_mutex_unlock(&d->lock);
    wake(d);
}

static void free_disk(struct nbd_disk *d)
{
    close(d->wake_fd);
    pthread_mutex_destroy(&d->lock);
    free(d);
}

static void nbd_close_disk(struct vs_disk *disk)
{
    struct nbd_disk *d = (struct nbd_disk *)disk;
    if (!d->closed) {
        pthread_mutex_lock(&d->lock);
        d->ending = true;
        pthread_mutex_unlock(&d->lock);
        wake(d);
        pthread_join(d->thread, NULL);
    }
    vs_nbd_release(d->nbd);
    free_disk(d);
}

static uint32_t abilities(const struct vs_nbd_export *export)
{
    return DISK_CLOSES_LATER | DISK_CAN_BE_CUT_OFF | DISK_ONE_BUFFER |
           (export->tells_extents ? DISK_TELLS_EXTENTS : 0) | (export->can_fua ? DISK_WRITES_DURABLY : 0);
}

vs_disk *vs_nbd_disk(vs_nbd *nbd)
{
    static const struct disk_ops ops = {.submit = nbd_submit, .cut_off = nbd_cut_off, .close = nbd_close_disk};
    uint32_t block_bytes = nbd->export.minimum_bytes > 512 ? nbd->export.minimum_bytes : 512;
    struct nbd_disk *d = calloc(1, sizeof *d);
    if (!d)
        return NULL;
    nbd_core->init(&d->disk, &ops, nbd->export.bytes, block_bytes, 1, abilities(&nbd->export));
    d->nbd = nbd;
    list_init(&d->todo);
    list_init(&d->under_way);
    list_init(&d->over);
    pthread_mutex_init(&d->lock, NULL);
    d->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (d->wake_fd < 0) {
        pthread_mutex_destroy(&d->lock);
        free(d);
        return NULL;
    }
    nbd_keep(nbd);
    if (pthread_create(&d->thread, NULL, run, d) != 0) {
        vs_nbd_release(nbd);
        free_disk(d);
        return NULL;
    }
    return &d->disk;
}
