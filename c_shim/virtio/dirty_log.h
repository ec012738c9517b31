/* SPDX-License-Identifier: Apache-2.0
 *
 * Which pages of a guest's memory the backend has written: a bitmap that the
 * frontend shares while it migrates the machine (vhost-user specification,
 * "Migration"; VHOST_USER_PROTOCOL_F_LOG_SHMFD). Not to be confused with
 * dirty_map.h, which is about disks.
 *
 * A bit is set after the bytes that it stands for were stored. The frontend
 * takes bits away at any time and then reads the pages: bit after bytes means
 * that what it has not read yet it will find marked again.
 *
 *   data, status    marked when the request is answered, by what is switched on
 *                   then: requests that were taken up before are marked too
 *   used ring       marked where it is written (virtqueue.c), under the guest
 *                   address that SET_VRING_ADDR gave
 *
 * A page that the log has no bit for would be lost on the way to the other
 * machine, so it ends the attachment, as lost memory does.
 */
#ifndef VS_DIRTY_LOG_H
#define VS_DIRTY_LOG_H

#include <stdbool.h>
#include <stdint.h>

#include "guest_memory.h"

/* VHOST_LOG_PAGE, whatever the machine's own page. */
#define DIRTY_LOG_PAGE_BYTES 4096u
/* Enough for 32 TiB of guest memory. A bound, since a log may have to be filled: the file behind it may be
 * sparse and of any size, and its pages count as ours. */
#define DIRTY_LOG_BYTES_MAX (1ull << 30)

/* Of an attachment. */
struct dirty_log {
    void *map; /* NULL: there is none */
    uint64_t map_bytes;
    uint8_t *bits; /* of the page at guest address 0, and up */
    uint64_t bytes;
    int sigbus_slot;
    bool missed;    /* something was to be marked while there was no log */
    bool too_small; /* something was to be marked beyond its end */
    bool changed;   /* since the frontend was last told (SET_LOG_FD) */
};

/* Puts a log in the place of the one there was. Closes fd. 0 or a negative errno; then the former one stays. */
int dirty_log_map(struct dirty_log *log, int fd, uint64_t bytes, uint64_t offset);
void dirty_log_unmap(struct dirty_log *log);
/* The frontend took its memory away (guest_memory.h, SIGBUS), or it does not cover what is written. */
bool dirty_log_lost(const struct dirty_log *log);

/* [addr, addr + bytes) of guest memory was written. bytes > 0. */
void dirty_log_mark(struct dirty_log *log, uint64_t addr, uint64_t bytes);
/* The same for bytes where they are mapped here, within one region of the table. */
void dirty_log_mark_host(struct dirty_log *log, const struct mem_table *table, const void *host, uint64_t bytes);

#endif
