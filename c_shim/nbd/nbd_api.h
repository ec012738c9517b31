/* SPDX-License-Identifier: Apache-2.0
 *
 * The NBD library as the control plane sees it: a connection is made and looked at, then becomes a disk for the
 * engine. Plain declarations, as in shim_api.h, which cffi parses before this file. All of it but vs_nbd_begin
 * waits for the server, each call no longer than it is told: call it off the event loop.
 */

typedef struct vs_nbd vs_nbd;

enum vs_nbd_limit { VS_NBD_CONNECTIONS_MAX = 16, VS_NBD_WHY_BYTES = 512 };

/* First of all: the core's side of the door. 0, or -EINVAL: the core was built from other headers. */
int vs_nbd_begin(const struct vs_disk_services *services);

/* What the server says of the export. */
struct vs_nbd_export {
    uint64_t bytes;
    uint32_t minimum_bytes;   /* offsets and lengths are multiples of it; 0: it does not say */
    uint32_t preferred_bytes; /* 0: it does not say */
    uint32_t maximum_bytes;   /* of one command's data */
    uint32_t read_only;
    uint32_t can_flush;
    uint32_t can_fua;
    uint32_t can_zero;
    uint32_t can_fast_zero;
    uint32_t can_multi_conn;
    uint32_t tells_extents;
    uint32_t encrypted;
};

/* Connections to an export, as many as the server lets work together, at most "connections". NULL: none, and why
 * (VS_NBD_WHY_BYTES, libnbd's words). */
vs_nbd *vs_nbd_connect(const char *uri, uint32_t connections, uint32_t timeout_ms, struct vs_nbd_export *found,
                       char *why);
/* 0 or a negative errno. */
int vs_nbd_read(vs_nbd *nbd, uint64_t offset, uint64_t length, void *to, uint32_t timeout_ms);
uint32_t vs_nbd_connections(const vs_nbd *nbd);
/* Says goodbye to the server, for a second at most. Not once a disk has the connections. */
void vs_nbd_close(vs_nbd *nbd);
/* The last of the caller's calls: nobody waits for its end any more. */
void vs_nbd_release(vs_nbd *nbd);
/* A disk for the engine, which has the connections from here on. NULL: errno says why; they stay. */
vs_disk *vs_nbd_disk(vs_nbd *nbd);

enum vs_nbd_state {
    VS_NBD_CONNECTED,
    VS_NBD_CLOSED,
    VS_NBD_LOST,     /* what was under way has failed, and so does all that comes */
    VS_NBD_HELD,     /* lost, and it is the guest's disk: what was under way, and what comes, waits for a connection */
    VS_NBD_UNCERTAIN /* the same, and the server may still carry out a change that it has not answered */
};

/* Of that disk: waits until it is not connected. Which state that is, and why (VS_NBD_WHY_BYTES). */
enum vs_nbd_state vs_nbd_await_loss(vs_nbd *nbd, char *why);
/* It is still held. */
int vs_nbd_is_held(vs_nbd *nbd);
/* The connections of "fresh" take the place of those that were lost, and what was held goes there. 0: it is not held
 * any more, and "fresh" stays as it is. */
int vs_nbd_replace(vs_nbd *nbd, vs_nbd *fresh);
/* Nobody will: what is held fails. */
void vs_nbd_give_up(vs_nbd *nbd);
