/* SPDX-License-Identifier: Apache-2.0
 *
 * Where an image may have data, as far as this process knows: it is the image's
 * only writer, so what read as zeroes when it was looked at does so until
 * it writes there (it may zero it). So each part of the image (a window) is looked
 * at once.
 *
 * The data thread notes a write before librbd has it; the looking thread asks
 * about windows. Both may at once: a bit is set, and never cleared.
 */
#ifndef VS_RBD_HOLES_H
#define VS_RBD_HOLES_H

#include <rbd/librbd.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct rbd_holes {
    uint64_t bytes;             /* of the image when it was opened; what lies beyond counts as data */
    _Atomic(uint64_t) *written; /* a bit for each grain: it may have data */
    bool *known;                /* for each window: written has all that the image held, too */
    bool all_data;              /* the image could not be asked */
};

/* False: no memory. */
bool rbd_holes_init(struct rbd_holes *h, uint64_t bytes);
void rbd_holes_free(struct rbd_holes *h);

void rbd_holes_write(struct rbd_holes *h, uint64_t offset, uint64_t length);
/* Up to data_at there is a hole, from there to data_end there may be data. May ask the image, for as long as that
 * takes. */
void rbd_holes_look(struct rbd_holes *h, rbd_image_t image, uint64_t offset, uint64_t length, uint64_t *data_at,
                    uint64_t *data_end);

#endif
