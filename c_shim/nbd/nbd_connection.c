/* SPDX-License-Identifier: Apache-2.0
 *
 * Connects to an NBD server, within a bound of time, and asks what its disk can do. See nbd_connection.h.
 */
#include "nbd_connection.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define GOODBYE_MS 1000
/* So long the kernel waits for the other host's. */
#define SILENCE_S 24
/* Where the server does not say (the NBD specification, "Block size constraints"). */
#define MAXIMUM_BYTES (32u << 20)

const struct vs_disk_services *nbd_core;

int vs_nbd_begin(const struct vs_disk_services *services)
{
    if (!disk_services_fit(services))
        return -EINVAL;
    nbd_core = services;
    return 0;
}

/* ---- waiting ---------------------------------------------------------------- */

static uint64_t clock_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void keep_reason(char *why, const char *text)
{
    snprintf(why, VS_NBD_WHY_BYTES, "%s", text ? text : "libnbd does not say why");
}

/* Until something came of it. False: not before the deadline, or the connection is lost; why. */
static bool await_something(struct nbd_handle *handle, uint64_t deadline_ms, char *why)
{
    uint64_t now = clock_ms();
    int came;
    if (now >= deadline_ms) {
        keep_reason(why, "the server does not answer in time");
        return false;
    }
    came = nbd_poll(handle, (int)(deadline_ms - now));
    if (came >= 0 || nbd_get_errno() == EINTR)
        return true;
    keep_reason(why, nbd_get_error());
    return false;
}

/* ---- making them ------------------------------------------------------------- */

static bool is_connecting(struct nbd_handle *handle)
{
    return nbd_aio_is_connecting(handle) > 0 || nbd_aio_is_negotiating(handle) > 0;
}

/* The URI may name files of certificates and keys: it is the operator's. */
static bool begin_connecting(struct nbd_handle *handle, const char *uri)
{
    return nbd_set_uri_allow_local_file(handle, true) == 0 &&
           nbd_set_uri_allow_transports(handle, LIBNBD_ALLOW_TRANSPORT_TCP | LIBNBD_ALLOW_TRANSPORT_UNIX) == 0 &&
           nbd_set_full_info(handle, false) == 0 && nbd_add_meta_context(handle, LIBNBD_CONTEXT_BASE_ALLOCATION) == 0 &&
           nbd_aio_connect_uri(handle, uri) == 0;
}

/* A host that has gone without a word is noticed, also where nothing is under way. Of a Unix socket nothing is set. */
static void watch_silence(int fd)
{
    static const struct {
        int level, name, value;
    } options[] = {
        {SOL_SOCKET, SO_KEEPALIVE, 1},
        {IPPROTO_TCP, TCP_KEEPIDLE, SILENCE_S / 2},
        {IPPROTO_TCP, TCP_KEEPINTVL, SILENCE_S / 6},
        {IPPROTO_TCP, TCP_KEEPCNT, 3},
        {IPPROTO_TCP, TCP_USER_TIMEOUT, SILENCE_S * 1000},
    };
    for (size_t i = 0; i < sizeof options / sizeof options[0]; i++)
        (void)setsockopt(fd, options[i].level, options[i].name, &options[i].value, sizeof options[i].value);
}

static struct nbd_handle *connect_one(const char *uri, uint64_t deadline_ms, char *why)
{
    struct nbd_handle *handle = nbd_create();
    if (!handle) {
        keep_reason(why, nbd_get_error());
        return NULL;
    }
    if (!begin_connecting(handle, uri)) {
        keep_reason(why, nbd_get_error());
        nbd_close(handle);
        return NULL;
    }
    keep_reason(why, "the server has ended the connection");
    while (is_connecting(handle) && await_something(handle, deadline_ms, why))
        ;
    if (nbd_aio_is_ready(handle) > 0) {
        watch_silence(nbd_aio_get_fd(handle));
        return handle;
    }
    nbd_close(handle);
    return NULL;
}

static uint32_t size_or(int64_t bytes, uint32_t otherwise)
{
    return bytes > 0 && bytes <= UINT32_MAX ? (uint32_t)bytes : otherwise;
}

static void look_at(struct nbd_handle *handle, struct vs_nbd_export *export)
{
    int64_t bytes = nbd_get_size(handle);
    uint32_t maximum = size_or(nbd_get_block_size(handle, LIBNBD_SIZE_MAXIMUM), MAXIMUM_BYTES);
    *export = (struct vs_nbd_export){
        .bytes = bytes > 0 ? (uint64_t)bytes : 0,
        .minimum_bytes = size_or(nbd_get_block_size(handle, LIBNBD_SIZE_MINIMUM), 0),
        .preferred_bytes = size_or(nbd_get_block_size(handle, LIBNBD_SIZE_PREFERRED), 0),
        .maximum_bytes = maximum < MAXIMUM_BYTES ? maximum : MAXIMUM_BYTES,
        .read_only = nbd_is_read_only(handle) != 0,
        .can_flush = nbd_can_flush(handle) > 0,
        .can_fua = nbd_can_fua(handle) > 0,
        .can_zero = nbd_can_zero(handle) > 0,
        .can_fast_zero = nbd_can_fast_zero(handle) > 0,
        .can_multi_conn = nbd_can_multi_conn(handle) > 0,
        .tells_extents = nbd_can_meta_context(handle, LIBNBD_CONTEXT_BASE_ALLOCATION) > 0,
        .encrypted = nbd_get_tls_negotiated(handle) > 0,
    };
}

/* The further ones, where a flush of one is a flush of all. False: the server does not let one in, or shows something
 * else there. */
static bool connect_others(struct vs_nbd *nbd, const char *uri, uint32_t wanted, uint64_t deadline_ms, char *why)
{
    while (nbd->export.can_multi_conn && nbd->connections < wanted) {
        struct nbd_handle *handle = connect_one(uri, deadline_ms, why);
        if (!handle)
            return false;
        nbd->handle[nbd->connections++] = handle;
        if (nbd_get_size(handle) != (int64_t)nbd->export.bytes) {
            keep_reason(why, "it shows exports of different sizes under one name");
            return false;
        }
    }
    return true;
}

vs_nbd *vs_nbd_connect(const char *uri, uint32_t connections, uint32_t timeout_ms, struct vs_nbd_export *found,
                       char *why)
{
    uint64_t deadline_ms = clock_ms() + timeout_ms;
    uint32_t wanted = connections < VS_NBD_CONNECTIONS_MAX ? connections : VS_NBD_CONNECTIONS_MAX;
    struct vs_nbd *nbd = calloc(1, sizeof *nbd);
    if (!nbd) {
        keep_reason(why, "there is no memory");
        return NULL;
    }
    pthread_mutex_init(&nbd->lock, NULL);
    pthread_cond_init(&nbd->told, NULL);
    nbd->references = 1;
    nbd->wake_fd = -1;
    nbd->handle[0] = connect_one(uri, deadline_ms, why);
    if (!nbd->handle[0]) {
        vs_nbd_release(nbd);
        return NULL;
    }
    nbd->connections = 1;
    look_at(nbd->handle[0], &nbd->export);
    if (!connect_others(nbd, uri, wanted, deadline_ms, why)) {
        vs_nbd_close(nbd);
        vs_nbd_release(nbd);
        return NULL;
    }
    *found = nbd->export;
    return nbd;
}

uint32_t vs_nbd_connections(const vs_nbd *nbd)
{
    return nbd->connections;
}

/* ---- asking one thing ----------------------------------------------------------- */

int vs_nbd_read(vs_nbd *nbd, uint64_t offset, uint64_t length, void *to, uint32_t timeout_ms)
{
    struct nbd_handle *handle = nbd->handle[0];
    uint64_t deadline_ms = clock_ms() + timeout_ms;
    char why[VS_NBD_WHY_BYTES];
    int64_t cookie;
    int done;
    if (!nbd->connections)
        return -ENOTCONN;
    if (length > nbd->export.maximum_bytes)
        return -EINVAL;
    cookie = nbd_aio_pread(handle, to, length, offset, NBD_NULL_COMPLETION, 0);
    if (cookie < 0)
        return nbd_get_errno() ? -nbd_get_errno() : -EIO;
    while ((done = nbd_aio_command_completed(handle, (uint64_t)cookie)) == 0)
        if (!await_something(handle, deadline_ms, why)) {
            int error = nbd_is_lost(handle) ? -ENOTCONN : -ETIMEDOUT;
            nbd_drop(nbd); /* it would still write into "to" */
            return error;
        }
    return done > 0 ? 0 : nbd_get_errno() ? -nbd_get_errno() : -EIO;
}

/* ---- ending them -------------------------------------------------------------------- */

void nbd_drop(struct vs_nbd *nbd)
{
    for (uint32_t i = 0; i < nbd->connections; i++)
        nbd_close(nbd->handle[i]);
    nbd->connections = 0;
}

/* A server that sees a connection end without it says so in its log, and with TLS takes it for an attack. */
void nbd_say_goodbye(struct vs_nbd *nbd)
{
    uint64_t deadline_ms = clock_ms() + GOODBYE_MS;
    char why[VS_NBD_WHY_BYTES];
    for (uint32_t i = 0; i < nbd->connections; i++)
        if (!nbd_is_lost(nbd->handle[i]))
            (void)nbd_aio_disconnect(nbd->handle[i], 0);
    for (uint32_t i = 0; i < nbd->connections; i++)
        while (!nbd_is_lost(nbd->handle[i]) && await_something(nbd->handle[i], deadline_ms, why))
            ;
    nbd_drop(nbd);
}

void vs_nbd_close(vs_nbd *nbd)
{
    nbd_say_goodbye(nbd);
}

void nbd_keep(struct vs_nbd *nbd)
{
    pthread_mutex_lock(&nbd->lock);
    nbd->references++;
    pthread_mutex_unlock(&nbd->lock);
}

void vs_nbd_release(vs_nbd *nbd)
{
    bool last;
    pthread_mutex_lock(&nbd->lock);
    last = --nbd->references == 0;
    pthread_mutex_unlock(&nbd->lock);
    if (!last)
        return;
    pthread_cond_destroy(&nbd->told);
    pthread_mutex_destroy(&nbd->lock);
    free(nbd);
}

/* Others may have come until nothing is held any more. */
void nbd_end(struct vs_nbd *nbd)
{
    nbd_say_goodbye(nbd);
    nbd_tell(nbd, VS_NBD_CLOSED, "");
    (void)nbd_look_for_fresh(nbd);
    nbd_say_goodbye(nbd);
}

/* ---- one that was lost ------------------------------------------------------------------ */

void nbd_wake_by(struct vs_nbd *nbd, int wake_fd)
{
    pthread_mutex_lock(&nbd->lock);
    nbd->wake_fd = wake_fd;
    pthread_mutex_unlock(&nbd->lock);
}

void nbd_tell(struct vs_nbd *nbd, enum vs_nbd_state state, const char *why)
{
    pthread_mutex_lock(&nbd->lock);
    if (nbd->state != VS_NBD_LOST) {
        nbd->state = state;
        keep_reason(nbd->why_lost, why);
    }
    pthread_cond_broadcast(&nbd->told);
    pthread_mutex_unlock(&nbd->lock);
}

enum vs_nbd_state vs_nbd_await_loss(vs_nbd *nbd, char *why)
{
    enum vs_nbd_state state;
    pthread_mutex_lock(&nbd->lock);
    while (nbd->state == VS_NBD_CONNECTED)
        pthread_cond_wait(&nbd->told, &nbd->lock);
    state = nbd->state;
    keep_reason(why, nbd->why_lost);
    pthread_mutex_unlock(&nbd->lock);
    return state;
}

static bool is_held(const struct vs_nbd *nbd)
{
    return nbd->state == VS_NBD_HELD || nbd->state == VS_NBD_UNCERTAIN;
}

int vs_nbd_is_held(vs_nbd *nbd)
{
    bool held;
    pthread_mutex_lock(&nbd->lock);
    held = is_held(nbd);
    pthread_mutex_unlock(&nbd->lock);
    return held;
}

static void wake(const struct vs_nbd *nbd)
{
    uint64_t one = 1;
    if (nbd->wake_fd >= 0 && write(nbd->wake_fd, &one, sizeof one) < 0 && errno != EAGAIN && errno != EINTR)
        abort();
}

int vs_nbd_replace(vs_nbd *nbd, vs_nbd *fresh)
{
    bool held;
    pthread_mutex_lock(&nbd->lock);
    held = is_held(nbd);
    if (held) {
        memcpy(nbd->fresh, fresh->handle, sizeof nbd->fresh);
        nbd->fresh_count = fresh->connections;
        fresh->connections = 0;
        nbd->state = VS_NBD_CONNECTED;
        wake(nbd);
    }
    pthread_mutex_unlock(&nbd->lock);
    return held;
}

void vs_nbd_give_up(vs_nbd *nbd)
{
    pthread_mutex_lock(&nbd->lock);
    nbd->given_up = true;
    wake(nbd);
    pthread_mutex_unlock(&nbd->lock);
}

enum vs_nbd_state nbd_look_for_fresh(struct vs_nbd *nbd)
{
    enum vs_nbd_state state;
    pthread_mutex_lock(&nbd->lock);
    if (nbd->fresh_count > 0) {
        memcpy(nbd->handle, nbd->fresh, sizeof nbd->handle);
        nbd->connections = nbd->fresh_count;
        nbd->fresh_count = 0;
    }
    state = nbd->given_up ? VS_NBD_LOST : nbd->state;
    pthread_mutex_unlock(&nbd->lock);
    return state;
}
