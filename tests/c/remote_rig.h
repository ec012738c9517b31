/* SPDX-License-Identifier: Apache-2.0
 *
 * A disk whose answers come from threads of its own (nbd/, rbd/), and the data thread's side of it: the main thread,
 * which keeps many operations in flight, each in a range of its own, and knows what every range has to hold.
 */
#ifndef VS_TEST_REMOTE_RIG_H
#define VS_TEST_REMOTE_RIG_H

#include <errno.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "disk_services.h"
#include "harness.h"
#include "patience.h"

#define SLOTS 32u
#define SLOT_BYTES (128u << 10)
#define RIG_BYTES (SLOTS * SLOT_BYTES)

struct slot {
    struct disk_io io;
    struct iovec iov[2];
    uint8_t *buffer, *holds;
    bool busy, unsure; /* a change of it has failed: it may hold either */
};

static struct rig {
    struct vs_disk *disk;
    struct disk_host host;
    int wake_fd;
    struct slot slots[SLOTS];
    uint64_t chance;
    unsigned done, failed;
    int failure; /* the last */
    bool closed;
} rig;

static void rig_open(struct vs_disk *disk)
{
    rig.disk = disk;
    rig.done = rig.failed = 0;
    rig.closed = false;
    rig.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(disk && rig.wake_fd >= 0);
    disk_host_init(&rig.host, NULL, rig.wake_fd);
    disk_adopt(disk, &rig.host);
    for (unsigned i = 0; i < SLOTS; i++)
        if (!rig.slots[i].buffer) {
            rig.slots[i].buffer = malloc(SLOT_BYTES);
            rig.slots[i].holds = calloc(1, SLOT_BYTES);
        }
}

/* The next disk is another one, all zeroes. */
static void rig_forget(void)
{
    for (unsigned i = 0; i < SLOTS; i++) {
        rig.slots[i].unsure = false;
        if (rig.slots[i].holds)
            memset(rig.slots[i].holds, 0, SLOT_BYTES);
    }
}

/* One look at what has come; waits for something. */
static void rig_turn(void)
{
    struct timespec now;
    uint64_t counter;
    CHECK(patience_readable(rig.wake_fd));
    CHECK(read(rig.wake_fd, &counter, sizeof counter) == sizeof counter);
    clock_gettime(CLOCK_MONOTONIC, &now);
    rig.host.now_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    disk_run_done(&rig.host);
}

static void slot_done(struct disk_io *io)
{
    struct slot *s = container_of(io, struct slot, io);
    uint64_t at = io->offset % SLOT_BYTES;
    s->busy = false;
    rig.done++;
    if (io->result < 0) {
        rig.failed++;
        rig.failure = io->result;
        s->unsure |= io->kind == VS_DISK_WRITE || io->kind == VS_DISK_ZERO;
    } else if (io->kind == VS_DISK_WRITE) {
        memcpy(s->holds + at, s->buffer, io->length);
    } else if (io->kind == VS_DISK_ZERO) {
        memset(s->holds + at, 0, io->length);
    } else if (io->kind == VS_DISK_READ && !s->unsure) {
        CHECK(memcmp(s->holds + at, s->buffer, io->length) == 0);
    } else if (io->kind == VS_DISK_EXTENTS && !s->unsure) {
        for (uint64_t i = io->offset; i < io->data_at; i++)
            CHECK_EQUAL(s->holds[i % SLOT_BYTES], 0);
    }
}

static uint32_t any_kind(void)
{
    static const uint32_t kinds[] = {VS_DISK_WRITE, VS_DISK_WRITE, VS_DISK_WRITE, VS_DISK_READ,
                                     VS_DISK_READ,  VS_DISK_FLUSH, VS_DISK_ZERO,  VS_DISK_EXTENTS};
    return kinds[test_random(&rig.chance) % (sizeof kinds / sizeof kinds[0])];
}

static void slot_submit(unsigned number)
{
    struct slot *s = &rig.slots[number];
    uint64_t at = test_random(&rig.chance) % (SLOT_BYTES / 512);
    uint64_t blocks = 1 + test_random(&rig.chance) % (SLOT_BYTES / 512 - at);
    s->io = (struct disk_io){.kind = any_kind(), .may_unmap = at & 1, .done = slot_done};
    if (s->io.kind != VS_DISK_FLUSH) {
        s->io.offset = number * SLOT_BYTES + at * 512;
        s->io.length = blocks * 512;
    }
    if (s->io.kind == VS_DISK_READ || s->io.kind == VS_DISK_WRITE) {
        uint64_t first = rig.disk->can & DISK_ONE_BUFFER ? s->io.length : s->io.length / 1024 * 512;
        s->iov[0] = (struct iovec){s->buffer, first ? first : s->io.length};
        s->iov[1] = (struct iovec){s->buffer + s->iov[0].iov_len, s->io.length - s->iov[0].iov_len};
        s->io.iov = s->iov;
        s->io.iov_count = s->iov[1].iov_len ? 2 : 1;
        if (s->io.kind == VS_DISK_WRITE)
            memset(s->buffer, 1 + (int)(test_random(&rig.chance) % 255), s->io.length);
    }
    s->busy = true;
    disk_submit(rig.disk, &s->io);
}

/* So many more are done, with all slots in flight; then none is. */
static void rig_work(unsigned operations)
{
    unsigned until = rig.done + operations;
    while (rig.done < until) {
        for (unsigned i = 0; i < SLOTS; i++)
            if (!rig.slots[i].busy)
                slot_submit(i);
        rig_turn();
    }
    while (rig.disk->stats.in_flight)
        rig_turn();
}

static void rig_fill_slots(void)
{
    for (unsigned i = 0; i < SLOTS; i++)
        if (!rig.slots[i].busy)
            slot_submit(i);
}

static void rig_drain(void)
{
    while (rig.disk->stats.in_flight)
        rig_turn();
}

static void rig_closed(struct disk_io *closing)
{
    rig.closed = true;
    disk_free(closing->work.disk);
}

static void rig_close(void)
{
    disk_close_later(rig.disk, rig_closed, NULL);
    while (!rig.closed)
        rig_turn();
    disk_host_free(&rig.host);
    close(rig.wake_fd);
}

static void rig_free(void)
{
    for (unsigned i = 0; i < SLOTS; i++) {
        free(rig.slots[i].buffer);
        free(rig.slots[i].holds);
    }
}

#endif
