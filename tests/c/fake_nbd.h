/* SPDX-License-Identifier: Apache-2.0
 *
 * In place of libnbd: connections whose server is the test. What the plugin sends is kept in order; the test answers
 * what it likes, in any order, or hangs up. As with libnbd, answers are heard within nbd_aio_notify_read() alone, and
 * what is under way when the other side has gone is answered there with ENOTCONN; a handle that is closed answers
 * nothing.
 */
#ifndef VS_FAKE_NBD_H
#define VS_FAKE_NBD_H

#include <errno.h>
#include <libnbd.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#include "harness.h"

#define FAKE_BYTES (1u << 20)
#define FAKE_COMMANDS 64

enum fake_kind { FAKE_READ, FAKE_WRITE, FAKE_ZERO, FAKE_FLUSH };

struct fake_command {
    enum fake_kind kind;
    nbd_completion_callback callback;
    bool answered;
    int error;
};

struct nbd_handle {
    int fd, other; /* the plugin's end, the test's */
    bool dead;
    struct fake_command sent[FAKE_COMMANDS];
    unsigned count, heard;
};

static pthread_mutex_t fake_lock = PTHREAD_MUTEX_INITIALIZER; /* guards what follows, and all handles */
static struct nbd_handle *fake_newest;
static int fake_open;

/* ---- the test's side: a server -------------------------------------------------------------- */

static inline void fake_pause(void)
{
    poll(NULL, 0, 1);
}

/* Waits until so many commands were sent. */
static inline void fake_await_sent(struct nbd_handle *h, unsigned count)
{
    unsigned sent = 0;
    while (sent < count) {
        pthread_mutex_lock(&fake_lock);
        sent = h->count;
        pthread_mutex_unlock(&fake_lock);
        fake_pause();
    }
}

static inline enum fake_kind fake_sent(struct nbd_handle *h, unsigned number)
{
    enum fake_kind kind;
    pthread_mutex_lock(&fake_lock);
    CHECK(number < h->count);
    kind = h->sent[number].kind;
    pthread_mutex_unlock(&fake_lock);
    return kind;
}

/* And waits until it is heard. */
static inline void fake_answer(struct nbd_handle *h, unsigned number, int error)
{
    bool heard = false;
    pthread_mutex_lock(&fake_lock);
    CHECK(number < h->count && !h->sent[number].answered);
    h->sent[number].error = error;
    h->sent[number].answered = true;
    CHECK(write(h->other, "a", 1) == 1);
    pthread_mutex_unlock(&fake_lock);
    while (!heard) {
        pthread_mutex_lock(&fake_lock);
        heard = h->sent[number].callback.callback == NULL;
        pthread_mutex_unlock(&fake_lock);
        fake_pause();
    }
}

static inline void fake_hang_up(struct nbd_handle *h)
{
    pthread_mutex_lock(&fake_lock); /* the plugin's thread closes it as soon as it sees this */
    CHECK(shutdown(h->other, SHUT_RDWR) == 0);
    pthread_mutex_unlock(&fake_lock);
}

/* ---- the plugin's side: what it uses of libnbd ------------------------------------------------- */

struct nbd_handle *nbd_create(void)
{
    struct nbd_handle *h = calloc(1, sizeof *h);
    int ends[2];
    CHECK(h && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    h->fd = ends[0];
    h->other = ends[1];
    pthread_mutex_lock(&fake_lock);
    fake_newest = h;
    fake_open++;
    pthread_mutex_unlock(&fake_lock);
    return h;
}

void nbd_close(struct nbd_handle *h)
{
    pthread_mutex_lock(&fake_lock);
    close(h->fd);
    close(h->other);
    fake_open--;
    pthread_mutex_unlock(&fake_lock);
    free(h);
}

static int64_t fake_send(struct nbd_handle *h, enum fake_kind kind, nbd_completion_callback callback)
{
    int64_t cookie;
    pthread_mutex_lock(&fake_lock);
    CHECK(h->count < FAKE_COMMANDS);
    h->sent[h->count] = (struct fake_command){.kind = kind, .callback = callback};
    cookie = h->dead ? -1 : (int64_t)++h->count;
    pthread_mutex_unlock(&fake_lock);
    return cookie;
}

int64_t nbd_aio_pread(struct nbd_handle *h, void *buf, size_t count, uint64_t offset, nbd_completion_callback callback,
                      uint32_t flags)
{
    CHECK(flags == 0 && offset + count <= FAKE_BYTES);
    memset(buf, 0, count);
    return fake_send(h, FAKE_READ, callback);
}

int64_t nbd_aio_pwrite(struct nbd_handle *h, const void *buf, size_t count, uint64_t offset,
                       nbd_completion_callback callback, uint32_t flags)
{
    (void)buf;
    CHECK(offset + count <= FAKE_BYTES && (flags & ~LIBNBD_CMD_FLAG_FUA) == 0);
    return fake_send(h, FAKE_WRITE, callback);
}

int64_t nbd_aio_zero(struct nbd_handle *h, uint64_t count, uint64_t offset, nbd_completion_callback callback,
                     uint32_t flags)
{
    (void)flags;
    CHECK(offset + count <= FAKE_BYTES);
    return fake_send(h, FAKE_ZERO, callback);
}

int64_t nbd_aio_flush(struct nbd_handle *h, nbd_completion_callback callback, uint32_t flags)
{
    CHECK(flags == 0);
    return fake_send(h, FAKE_FLUSH, callback);
}

int64_t nbd_aio_block_status(struct nbd_handle *h, uint64_t count, uint64_t offset, nbd_extent_callback extent,
                             nbd_completion_callback callback, uint32_t flags)
{
    (void)h, (void)count, (void)offset, (void)extent, (void)callback, (void)flags;
    return -1; /* it tells no extents */
}

/* Outside of the lock: a callback may do anything but call libnbd. The test sees that it was called. */
static void fake_hear(struct nbd_handle *h, bool all)
{
    for (unsigned i = 0; i < h->count; i++) {
        struct fake_command *c = &h->sent[i];
        nbd_completion_callback callback;
        int error;
        pthread_mutex_lock(&fake_lock);
        callback = c->callback;
        error = c->answered ? c->error : ENOTCONN;
        if (!c->answered && !all)
            callback.callback = NULL;
        pthread_mutex_unlock(&fake_lock);
        if (!callback.callback)
            continue;
        callback.callback(callback.user_data, &error);
        pthread_mutex_lock(&fake_lock);
        c->callback.callback = NULL;
        pthread_mutex_unlock(&fake_lock);
    }
}

int nbd_aio_notify_read(struct nbd_handle *h)
{
    char bytes[FAKE_COMMANDS];
    ssize_t found = recv(h->fd, bytes, sizeof bytes, MSG_DONTWAIT);
    if (found < 0)
        return 0;
    h->dead = found == 0;
    fake_hear(h, h->dead);
    return h->dead ? -1 : 0;
}

int nbd_aio_notify_write(struct nbd_handle *h)
{
    (void)h;
    return 0;
}

int nbd_aio_get_fd(struct nbd_handle *h)
{
    return h->fd;
}

unsigned nbd_aio_get_direction(struct nbd_handle *h)
{
    (void)h;
    return LIBNBD_AIO_DIRECTION_READ;
}

int nbd_aio_is_dead(struct nbd_handle *h)
{
    return h->dead;
}

int nbd_aio_is_closed(struct nbd_handle *h)
{
    (void)h;
    return 0;
}

int nbd_aio_is_ready(struct nbd_handle *h)
{
    return !h->dead;
}

int nbd_aio_is_connecting(struct nbd_handle *h)
{
    (void)h;
    return 0;
}

int nbd_aio_is_negotiating(struct nbd_handle *h)
{
    (void)h;
    return 0;
}

/* The server lets go at once. */
int nbd_aio_disconnect(struct nbd_handle *h, uint32_t flags)
{
    CHECK(flags == 0);
    h->dead = true;
    return 0;
}

int nbd_aio_connect_uri(struct nbd_handle *h, const char *uri)
{
    (void)h;
    CHECK(uri[0]);
    return 0;
}

int nbd_aio_command_completed(struct nbd_handle *h, uint64_t cookie)
{
    (void)h, (void)cookie;
    return 1;
}

int nbd_poll(struct nbd_handle *h, int timeout)
{
    (void)h, (void)timeout;
    return 1;
}

int64_t nbd_get_size(struct nbd_handle *h)
{
    (void)h;
    return FAKE_BYTES;
}

int64_t nbd_get_block_size(struct nbd_handle *h, int type)
{
    (void)h, (void)type;
    return 0;
}

int nbd_can_meta_context(struct nbd_handle *h, const char *name)
{
    (void)h, (void)name;
    return 0;
}

const char *nbd_get_error(void)
{
    return NULL;
}

int nbd_get_errno(void)
{
    return ENOTCONN;
}

int nbd_set_uri_allow_transports(struct nbd_handle *h, uint32_t mask)
{
    (void)h, (void)mask;
    return 0;
}

int nbd_add_meta_context(struct nbd_handle *h, const char *name)
{
    (void)h, (void)name;
    return 0;
}

#define FAKE_ANSWER(name, answer)  \
    int name(struct nbd_handle *h) \
    {                              \
        (void)h;                   \
        return answer;             \
    }
FAKE_ANSWER(nbd_is_read_only, 0)
FAKE_ANSWER(nbd_can_flush, 1)
FAKE_ANSWER(nbd_can_fua, 1)
FAKE_ANSWER(nbd_can_zero, 1)
FAKE_ANSWER(nbd_can_fast_zero, 0)
FAKE_ANSWER(nbd_can_multi_conn, 0)
FAKE_ANSWER(nbd_get_tls_negotiated, 0)

#define FAKE_SET(name)                         \
    int name(struct nbd_handle *h, bool value) \
    {                                          \
        (void)h, (void)value;                  \
        return 0;                              \
    }
FAKE_SET(nbd_set_uri_allow_local_file)
FAKE_SET(nbd_set_full_info)

#endif
