/* SPDX-License-Identifier: Apache-2.0
 *
 * Connections to one export of an NBD server: made, asked one thing at a time, ended, by whoever waits for it.
 * libnbd has no timeouts; all here have.
 */
#ifndef VS_NBD_CONNECTION_H
#define VS_NBD_CONNECTION_H

#include <libnbd.h>

#include "disk_services.h"
#include "nbd_api.h"

struct vs_nbd {
    struct nbd_handle *handle[VS_NBD_CONNECTIONS_MAX];
    uint32_t connections;
    struct vs_nbd_export export;
    /* Between the disk's thread and whoever looks after its connection. */
    pthread_mutex_t lock; /* guards the rest */
    pthread_cond_t told;
    unsigned references;
    int wake_fd; /* of the disk's thread; -1: there is none */
    enum vs_nbd_state state;
    char why_lost[VS_NBD_WHY_BYTES];
    bool given_up;
    struct nbd_handle *fresh[VS_NBD_CONNECTIONS_MAX]; /* to take the place of those that were lost */
    uint32_t fresh_count;
};

/* What the core does for disks of this kind. */
extern const struct vs_disk_services *nbd_core;

/* It answers nothing any more, whatever is still under way. */
static inline bool nbd_is_lost(struct nbd_handle *handle)
{
    return nbd_aio_is_dead(handle) > 0 || nbd_aio_is_closed(handle) > 0;
}

void nbd_keep(struct vs_nbd *nbd);
/* The disk's thread is woken by this descriptor; -1: not any more. */
void nbd_wake_by(struct vs_nbd *nbd, int wake_fd);
void nbd_tell(struct vs_nbd *nbd, enum vs_nbd_state state, const char *why);
/* What has become of one that is held. */
enum vs_nbd_state nbd_look_for_fresh(struct vs_nbd *nbd);
/* Says goodbye, as long as something is heard of the server within the time; then they are closed. */
void nbd_say_goodbye(struct vs_nbd *nbd);
/* The disk's thread ends: so does whatever it has, also what has just come to take the place of what was lost. */
void nbd_end(struct vs_nbd *nbd);
/* Closed as they are. What is under way is forgotten: no callback is called any more. */
void nbd_drop(struct vs_nbd *nbd);

#endif
