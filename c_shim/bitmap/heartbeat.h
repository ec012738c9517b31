/* SPDX-License-Identifier: Apache-2.0
 *
 * Until when the disks' files may bear times that come from our own writes, in
 * the dirty bitmap's file. See heartbeat.c.
 */
#ifndef VS_HEARTBEAT_H
#define VS_HEARTBEAT_H

#include <stdbool.h>
#include <stdint.h>

#include "uring.h"

struct activity;
struct vs_bitmap;

/* As it lies in the file, at the end of the control plane's block (heartbeat.py): CLOCK_REALTIME. */
struct heartbeat_until {
    uint64_t source_ns, destination_ns;
};

struct heartbeat {
    struct uring *uring;
    struct uring_op op;
    bool in_flight;
    /* There was a destination at the last look: one that has gone since is ours up to now, and no longer. */
    bool attached;
    uint64_t changes_seen;        /* of disk_host.changes */
    struct heartbeat_until until; /* as it is in the file, or on its way there */
};

/* bitmap: NULL, there is none. 0 or a negative errno. */
int heartbeat_init(struct heartbeat *h, struct uring *uring, const struct vs_bitmap *bitmap);
/* changes: disk_host.changes. attached: there is a destination, or a former one that is not over. */
void heartbeat_pump(struct heartbeat *h, const struct activity *activity, uint64_t changes, bool attached);

#endif
