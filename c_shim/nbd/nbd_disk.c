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
 * When one connection is lost, all are closed, and whatever is under way or comes later fails with ENOTCONN: a lost
 * connection is a lost disk. What was under way the server may still carry out, also after another connection began: it
 * is "unanswered".
 *
 * But the disk that a guest is on is held: all of that waits until whoever looks after it has made other connections
 * (vs_nbd_replace), behind the fence where a change is unanswered, and is sent again; or until that is given up. It is
 * so only once nothing can be forgotten that was answered: each write that a guest waits for is durable when it is
 * answered (work.durable), and what came before, by a flush.
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

/* What libnbd has given up has an error by now; the rest is under way. Neither has an answer: all of it is under way
 * again. True: changes are among it. */
static bool gather_unanswered(struct nbd_disk *d)
{
    bool changes = false;
    list_each_safe(node, &d->over) {
        const struct disk_io *io = nbd_io_at(node);
        if (io->result != -ENOTCONN && io->result != -ESHUTDOWN)
            continue;
        list_remove(node);
        list_append(&d->under_way, node);
    }
    list_each(node, &d->under_way) {
        struct disk_io *io = nbd_io_at(node);
        io->work.unanswered = true;
        changes |= io->kind == VS_DISK_WRITE || io->kind == VS_DISK_ZERO;
    }
    return changes;
}

static void fail_all(struct nbd_disk *d)
{
    while (!list_empty(&d->under_way))
        nbd_fail(d, nbd_io_at(d->under_way.next), -ENOTCONN);
}

/* Where nothing is under way, the engine would learn of it with its next request. */
static void wake_engine(struct nbd_disk *d)
{
    struct disk_host *host;
    struct list none;
    pthread_mutex_lock(&d->lock);
    host = d->host;
    pthread_mutex_unlock(&d->lock);
    list_init(&none);
    if (host)
        nbd_core->complete_remote_all(host, &none);
}

/* The guest's own disk may come back, if nothing that was answered can be forgotten meanwhile. */
static bool may_come_back(const struct nbd_disk *d)
{
    return d->served && d->durable;
}

static void lose(struct nbd_disk *d, const char *why)
{
    bool uncertain;
    if (d->lost || d->holding)
        return;
    d->disk.lost = true;
    uncertain = gather_unanswered(d);
    nbd_drop(d->nbd); /* and no answer comes any more */
    d->durable_asked = 0;
    d->holding = may_come_back(d);
    d->lost = !d->holding;
    if (d->holding) {
        list_splice(&d->held, &d->under_way);
        nbd_tell(d->nbd, uncertain ? VS_NBD_UNCERTAIN : VS_NBD_HELD, why);
    } else {
        fail_all(d);
        nbd_tell(d->nbd, VS_NBD_LOST, why);
    }
    wake_engine(d);
}

/* Nobody waits for another connection any more. */
static void stop_holding(struct nbd_disk *d, const char *why)
{
    d->holding = false;
    d->lost = true;
    list_splice(&d->under_way, &d->held);
    fail_all(d);
    nbd_tell(d->nbd, VS_NBD_LOST, why);
}

/* ---- the thread -------------------------------------------------------------------------- */

static void issue(struct nbd_disk *d, struct disk_io *io)
{
    list_append(d->holding ? &d->held : &d->under_way, &io->work.remote_link);
    if (d->lost)
        nbd_fail(d, io, -ENOTCONN);
    else if (!d->holding)
        nbd_command(d, io);
}

static void issue_all(struct nbd_disk *d, struct list *ios)
{
    struct list *node;
    while ((node = list_pop(ios))) {
        struct disk_io *io = nbd_io_at(node);
        if (io->kind == VS_DISK_CLOSE)
            d->closing = io;
        else
            issue(d, io);
    }
}

/* Another connection may have come. */
static void look_for_fresh(struct nbd_disk *d)
{
    struct list held;
    enum vs_nbd_state state = nbd_look_for_fresh(d->nbd);
    if (state == VS_NBD_LOST)
        stop_holding(d, "no other connection came in time");
    if (state != VS_NBD_CONNECTED)
        return;
    d->holding = false;
    d->disk.lost = false;
    d->why[0] = '\0';
    list_init(&held);
    list_splice(&held, &d->held);
    list_each(node, &held)
        nbd_io_at(node)->work.unanswered = false;
    issue_all(d, &held);
}

/* From now on, or not any more, an answered write has to be durable. */
static void note_service(struct nbd_disk *d, bool serves)
{
    if (serves == d->served)
        return;
    d->served = serves;
    d->durable = false;
    if (serves && !d->lost && !d->holding)
        nbd_begin_durable(d);
}

/* What was handed over since. True: the thread is to end. */
static bool take(struct nbd_disk *d)
{
    struct list handed_over;
    bool cut_off, ending, serves;
    list_init(&handed_over);
    pthread_mutex_lock(&d->lock);
    d->asleep = false;
    list_splice(&handed_over, &d->todo);
    cut_off = d->cut_off;
    ending = d->ending;
    serves = d->serves;
    pthread_mutex_unlock(&d->lock);
    note_service(d, serves);
    if (d->holding)
        look_for_fresh(d);
    issue_all(d, &handed_over);
    if (cut_off)
        d->durable = false; /* nobody waits for it any more */
    if (cut_off && d->holding)
        stop_holding(d, "it was not waited for any longer");
    else if (cut_off)
        lose(d, "the server does not answer in time");
    else if (nbd_any_lost(d))
        lose(d, d->why[0] ? d->why : "the server has ended the connection");
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

/* Nothing that was sent has its answer to come. What the server says all the same, look_around() finds. */
static bool none_is_due(const struct nbd_disk *d)
{
    return list_empty(&d->under_way) && d->durable_asked == 0;
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
        if (none_is_due(d) || poll(&again, 1, 0) < 0)
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
    nbd_end(d->nbd);
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
    io->work.durable = disk->serves && disk->can & DISK_WRITES_DURABLY;
    if (io->kind == VS_DISK_ZERO)
        nbd_plan_zero(d, io);
    if (io->kind == VS_DISK_CLOSE) {
        d->closed = true;
        pthread_detach(d->thread);
    }
    pthread_mutex_lock(&d->lock);
    list_append(&d->todo, &io->work.remote_link);
    d->serves = disk->serves;
    d->host = disk->host;
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
    nbd_wake_by(d->nbd, -1);
    vs_nbd_release(d->nbd);
    free_disk(d);
}

static uint32_t abilities(const struct vs_nbd_export *export)
{
    return DISK_CLOSES_LATER | DISK_CAN_BE_CUT_OFF | DISK_ONE_BUFFER | DISK_IS_FAR |
           (export->tells_extents ? DISK_TELLS_EXTENTS : 0) | (export->can_fua ? DISK_WRITES_DURABLY : 0);
}

vs_disk *vs_nbd_disk(vs_nbd *nbd)
{
    static const struct disk_ops ops = {.submit = nbd_submit, .cut_off = nbd_cut_off, .close = nbd_close_disk};
    uint32_t block_bytes = nbd->export.minimum_bytes > 512 ? nbd->export.minimum_bytes : 512;
    struct nbd_disk *d = calloc(1, sizeof *d);
    int rc;
    if (!d)
        return NULL;
    nbd_core->init(&d->disk, &ops, nbd->export.bytes, block_bytes, 1, abilities(&nbd->export));
    d->nbd = nbd;
    list_init(&d->todo);
    list_init(&d->under_way);
    list_init(&d->over);
    list_init(&d->held);
    pthread_mutex_init(&d->lock, NULL);
    d->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (d->wake_fd < 0) {
        rc = errno;
        pthread_mutex_destroy(&d->lock);
        free(d);
        errno = rc;
        return NULL;
    }
    nbd_keep(nbd);
    nbd_wake_by(nbd, d->wake_fd);
    rc = pthread_create(&d->thread, NULL, run, d);
    if (rc != 0) {
        nbd_wake_by(nbd, -1);
        vs_nbd_release(nbd);
        free_disk(d);
        errno = rc;
        return NULL;
    }
    return &d->disk;
}
