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

struct vs_engine;
struct bell;

struct bells {
    aio_context_t context; /* 0: there is none here */
    int null_fd;
    struct list under_way; /* bells whose write is not over */
};

void bells_init(struct vs_engine *e);
/* No write is under way any more, or the ring is gone. */
void bells_free(struct vs_engine *e);
/* The end: what is under way is not waited for. */
void bells_cancel(struct vs_engine *e);

/* Takes "fd" (-1: none) in the place of *bell, whose descriptor is closed. Without memory there is none. */
void bell_hang(struct vs_engine *e, struct bell **bell, int fd);
/* NULL is fine. */
void bell_ring(struct bell *bell);

/* It is an eventfd: nothing that is done to it can sleep but a read or a write. */
bool is_event_fd(int fd);
/* Closes what a frontend gave us: with anything but an eventfd, the close itself may block, so a worker does it. */
void close_foreign_fd(struct vs_engine *e, int fd);

#endif
