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
    /* For whoever waits for its end. */
    pthread_mutex_t lock; /* guards the rest */
    pthread_cond_t told;
    unsigned references;
    bool ended, lost;
    char why_lost[VS_NBD_WHY_BYTES];
};

/* What the core does for disks of this kind. */
extern const struct vs_disk_services *nbd_core;

/* It answers nothing any more, whatever is still under way. */
static inline bool nbd_is_lost(struct nbd_handle *handle)
{
    return nbd_aio_is_dead(handle) > 0 || nbd_aio_is_closed(handle) > 0;
}

void nbd_keep(struct vs_nbd *nbd);
/* Once. why: it is lost; NULL: it was closed in order. */
void nbd_tell_end(struct vs_nbd *nbd, const char *why);
/* Says goodbye, as long as something is heard of the server within the time; then they are closed. */
void nbd_say_goodbye(struct vs_nbd *nbd);
/* Closed as they are. What is under way is forgotten: no callback is called any more. */
void nbd_drop(struct vs_nbd *nbd);

#endif
