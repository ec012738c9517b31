/* SPDX-License-Identifier: Apache-2.0
 *
 * What a frontend is told by: its call, error and log descriptors. A ring of a
 * bell never blocks, whatever the frontend does to the descriptor. See bell.c.
 */
#ifndef VS_BELL_H
#define VS_BELL_H

#include <linux/aio_abi.h>
#include <stdbool.h>
#include <stdint.h>

#include "list.h"
#include "uring.h"

struct bell;

struct bells {
    struct uring *uring; /* NULL: it does not run yet, or not any more */
    unsigned outside;    /* operations of the ring's workers on descriptors of frontends */
    struct uring_op closed;
    aio_context_t context; /* 0: there is none here */
    int null_fd;
    struct list under_way; /* bells whose write is not over */
};

void bells_init(struct bells *b);
/* No write is under way any more, or the ring is gone. */
void bells_free(struct bells *b);
/* The end: what is under way is not waited for. */
void bells_cancel(struct bells *b);

/* Takes "fd" (-1: none) in the place of *bell, whose descriptor is closed. Without memory there is none. */
void bell_hang(struct bells *b, struct bell **bell, int fd);
/* NULL is fine. */
void bell_ring(struct bell *bell);

/* It is an eventfd: nothing that is done to it can sleep but a read or a write. */
bool is_event_fd(int fd);
/* Closes what a frontend gave us: with anything but an eventfd, the close itself may block, so a worker does it. */
void close_foreign_fd(struct bells *b, int fd);

#endif
