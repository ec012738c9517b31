/* SPDX-License-Identifier: Apache-2.0
 *
 * Reads and composes the copies of the activity log in the bitmap's file. See activity_file.h for where they lie, and
 * activity_log.c for what they are for.
 */
#include "activity_file.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ACTIVITY_MAGIC 0x766873416374694cu
uint64_t activity_log_bytes(uint32_t extents)
{
    uint64_t bytes = sizeof(struct activity_head) + extents * sizeof(uint64_t);
    return (bytes + BITMAP_BLOCK_BYTES - 1) / BITMAP_BLOCK_BYTES * BITMAP_BLOCK_BYTES;
}

static uint64_t sum_of(const struct activity_head *head)
{
    uint64_t sum = bitmap_mix(0, head->magic) ^ bitmap_mix(1, head->sequence) ^ bitmap_mix(2, head->count);
    for (uint64_t i = 0; i < head->count; i++)
        sum ^= bitmap_mix(3 + i, head->extent[i]);
    return sum;
}

static int transfer_all(int fd, void *buffer, uint64_t bytes, uint64_t offset, bool write)
{
    for (uint64_t done = 0; done < bytes;) {
        char *at = (char *)buffer + done;
        ssize_t n = write ? pwrite(fd, at, bytes - done, (off_t)(offset + done))
                          : pread(fd, at, bytes - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        done += (uint64_t)n;
    }
    return 0;
}

/* 1: the copy is whole. */
static int read_copy(int fd, const struct vs_bitmap *b, uint64_t which, struct activity_head *head)
{
    uint64_t most = (b->log_bytes - sizeof *head) / sizeof(uint64_t);
    int rc = transfer_all(fd, head, b->log_bytes, bitmap_log_offset(b, which), false);
    if (rc < 0)
        return rc;
    return head->magic == ACTIVITY_MAGIC && head->count <= most && head->checksum == sum_of(head);
}

int activity_log_read(int fd, struct vs_bitmap *b, struct activity_list *out)
{
    struct activity_head *copy[2] = {malloc(b->log_bytes), malloc(b->log_bytes)}, *newest = NULL;
    int rc = copy[0] && copy[1] ? 0 : -ENOMEM;
    for (uint64_t i = 0; i < 2 && rc >= 0; i++) {
        rc = read_copy(fd, b, i, copy[i]);
        if (rc > 0 && (!newest || copy[i]->sequence > newest->sequence))
            newest = copy[i];
    }
    if (rc >= 0 && !newest)
        rc = -EUCLEAN;
    if (rc >= 0) {
        rc = 0;
        b->log_sequence = newest->sequence;
        out->count = (uint32_t)newest->count;
        out->extent = calloc(newest->count + 1, sizeof(uint64_t));
        if (out->extent)
            memcpy(out->extent, newest->extent, newest->count * sizeof(uint64_t));
        else
            rc = -ENOMEM;
    }
    free(copy[0]);
    free(copy[1]);
    return rc;
}

int activity_log_sequence(int fd, struct vs_bitmap *b)
{
    struct activity_list list;
    int rc = activity_log_read(fd, b, &list);
    if (rc == -EUCLEAN)
        return activity_log_clear(fd, b);
    if (rc == 0)
        free(list.extent);
    return rc;
}

void activity_compose(struct activity_head *head, uint64_t sequence)
{
    head->magic = ACTIVITY_MAGIC;
    head->sequence = sequence;
    head->checksum = sum_of(head);
}

int activity_log_clear(int fd, struct vs_bitmap *b)
{
    struct activity_head *head = calloc(1, b->log_bytes);
    int rc = head ? 0 : -ENOMEM;
    for (uint64_t sequence = 1; sequence <= 2 && rc == 0; sequence++) {
        activity_compose(head, sequence);
        rc = transfer_all(fd, head, b->log_bytes, bitmap_log_offset(b, sequence), true);
    }
    b->log_sequence = 2;
    free(head);
    return rc;
}
