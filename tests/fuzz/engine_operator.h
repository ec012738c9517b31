/* SPDX-License-Identifier: Apache-2.0
 *
 * The operator of fuzz_engine.c, who commands in any order, and the disks, which
 * fail, hang, lose what they held and come back.
 */
#ifndef VS_FUZZ_ENGINE_OPERATOR_H
#define VS_FUZZ_ENGINE_OPERATOR_H

#include "engine_world.h"

static vs_disk *new_disk(void)
{
    vs_disk *disk = vs_test_disk(DISK_BYTES, 512);
    ENSURE(disk);
    if (choose(&w.c, 4) == 3)
        vs_test_disk_buffered(disk);
    vs_test_disk_keep(disk);
    w.disk[w.disks++] = disk;
    return disk;
}

/* One whose flush has failed fails them all. */
static bool forgets_failed_flush(const vs_disk *disk)
{
    return disk->can & DISK_FORGETS_FAILED_FLUSH;
}

/* The engine is through with it (the reference that is left is ours), so it can be attached again. */
static bool nobody_has(vs_disk *disk)
{
    struct test_disk *t = test_disk_of(disk);
    pthread_mutex_lock(&t->lock);
    bool ours = t->references == 1;
    pthread_mutex_unlock(&t->lock);
    return ours;
}

/* ---- mirroring ------------------------------------------------------------------- */

/* A destination that is slow or bad from the beginning, so that copy and guest meet. */
static void disturb_copy(vs_disk *destination)
{
    vs_disk *source = w.disk[w.source];
    uint32_t op = choose(&w.c, 2) ? VS_DISK_WRITE : VS_DISK_ZERO;
    switch (choose(&w.c, 7)) {
    case 1:
    case 2:
        vs_test_disk_hold(destination, op, 1);
        return;
    case 3:
        vs_test_disk_hold(source, VS_DISK_READ, 1);
        return;
    case 4:
        vs_test_disk_fault(destination, choose(&w.c, VS_DISK_OPS), EIO, (int)choose(&w.c, 8), 1);
        return;
    case 5:
        vs_test_disk_fault(source, VS_DISK_READ, EIO, (int)choose(&w.c, 8), 1);
        return;
    case 6:
        vs_test_disk_spoil(source, 4096ull * choose(&w.c, CAPACITY / 4096), 4096);
        w.spoilt = true;
        return;
    default:
        return;
    }
}

static int start_with(vs_disk *disk, uint32_t flags)
{
    uint64_t token =
        submit(&(struct vs_command){.kind = VS_CMD_MIRROR_START, .fd = -1, .start = {.disk = disk, .flags = flags}});
    return token ? wait_for(token).result : -EAGAIN;
}

static void mirror_to_new_disk(void)
{
    vs_disk *disk;
    if (w.disks == DISKS_MAX)
        return;
    disk = new_disk();
    disturb_copy(disk);
    if (start_with(disk, 0) < 0)
        vs_disk_close(disk); /* the engine's reference, still ours */
    else
        w.destination = (int)w.disks - 1;
}

/* To the last one again. The engine refuses it where it does not know what that one lacks. */
static int mirror_again(uint32_t flags)
{
    vs_disk *disk = w.destination < 0 ? NULL : w.disk[w.destination];
    int rc;
    if (!disk || !nobody_has(disk))
        return -EBUSY;
    vs_test_disk_keep(disk);
    rc = start_with(disk, VS_START_RESYNC | flags);
    if (rc < 0)
        vs_test_disk_drop(disk);
    return rc;
}

/* ---- switching ------------------------------------------------------------------- */

static void exchange(uint32_t flags)
{
    static uint64_t mark;
    uint64_t value = mark + 1;
    uint64_t token = submit(&(struct vs_command){.kind = VS_CMD_EXCHANGE, .fd = -1, .exchange = {flags, &mark, value}});
    int rc = token ? wait_for(token).result : -EAGAIN;
    ENSURE((__atomic_load_n(&mark, __ATOMIC_ACQUIRE) == value) == (rc == 0));
    if (rc == 0) {
        int old = w.source;
        w.source = w.destination;
        w.destination = old;
    } else if (choose(&w.c, 8) != 7) {
        simple(VS_CMD_UNGATE, 0);
    }
}

/* As it should be done, mostly. */
static void switch_over(void)
{
    static const uint32_t usual[] = {0, VS_EXCHANGE_KEEP, VS_EXCHANGE_ACCEPT, VS_EXCHANGE_DIFFERENT};
    uint64_t token;
    if (choose(&w.c, 4) != 3) /* not from a source that has failed */
        simple(VS_CMD_MIRROR_DRAIN, choose(&w.c, 4) != 3);
    token = simple(VS_CMD_GATE, 1000 * (1 + choose(&w.c, 20)));
    /* Mostly it waits for the gate by itself. */
    if (choose(&w.c, 3) == 2 && token && wait_for(token).result == 0 && choose(&w.c, 8) == 7)
        return; /* and left like that */
    exchange(choose(&w.c, 8) == 7 ? choose(&w.c, 8) : usual[choose(&w.c, 4)]);
}

/* ---- growing --------------------------------------------------------------------- */

static void grow(void)
{
    struct vs_command c = {.kind = VS_CMD_GROW, .fd = -1};
    uint64_t more = 512ull * (1 + choose(&w.c, 256));
    if (w.grow_token)
        return;
    c.grow.capacity_bytes = w.capacity + (choose(&w.c, 2) ? more : (more + 4095) & ~4095ull);
    c.grow.source_bytes = c.grow.destination_bytes = DISK_BYTES;
    if (rarely(&w.c)) /* they are smaller than they are: it is refused */
        c.grow.source_bytes = c.grow.capacity_bytes - 1;
    if (c.grow.capacity_bytes > DISK_BYTES)
        return;
    w.grow_capacity = c.grow.capacity_bytes;
    w.grow_token = submit(&c);
}

static void measure(void)
{
    uint64_t token = simple(VS_CMD_DISK_SIZE, choose(&w.c, 3));
    struct answer a = {.result = -EAGAIN};
    if (token)
        a = wait_for(token);
    ENSURE(a.result == 0 ? a.value == DISK_BYTES : a.result == -ENOTCONN || a.result == -EBUSY || a.result == -EAGAIN);
}

/* ---- in any order ------------------------------------------------------------------ */

static void verify(void)
{
    struct vs_command c = {.kind = VS_CMD_VERIFY, .fd = -1};
    c.verify.repair = choose(&w.c, 2);
    c.verify.speed_bytes_per_s = choose(&w.c, 4) == 3 ? 1u << 22 : 0;
    submit(&c);
}

static void lose_bitmap(void)
{
    if (w.bitmap_fd < 0 || !rarely(&w.c))
        return;
    ENSURE(ftruncate(w.bitmap_fd, 4096) == 0);
    usleep(300);
    ENSURE(ftruncate(w.bitmap_fd, (off_t)w.bitmap_bytes) == 0);
}

static void operate_rarely(void)
{
    switch (choose(&w.c, 13)) {
    case 0:
        simple(VS_CMD_GATE, 1000 * choose(&w.c, 20));
        return;
    case 1:
        simple(VS_CMD_FAILOVER_GIVE_UP, 0);
        return;
    case 2:
        simple(VS_CMD_CATCH_UP, 0);
        return;
    case 3:
        simple(VS_CMD_VERIFY_STOP, 0);
        return;
    case 4:
        simple(VS_CMD_GROW_STOP, 0);
        return;
    case 5:
        simple(VS_CMD_PEER_DIFFERS, choose(&w.c, 2));
        return;
    case 6:
        simple(VS_CMD_BITMAP_VOID, 0);
        return;
    case 7:
        measure();
        return;
    case 8:
        lose_bitmap();
        return;
    case 9: /* what no command is */
        simple((uint32_t)choose_raw(&w.c, 4) | 1u << 16, choose_raw(&w.c, 8));
        return;
    case 10:
        exchange(choose(&w.c, 8));
        return;
    case 11:
        simple(VS_CMD_MIRROR_LEAVE, 0);
        return;
    default:
        simple(VS_CMD_MIRROR_SPEED, choose(&w.c, 2) ? 0 : 1u << 22);
    }
}

static void operate(void)
{
    switch (choose(&w.c, 14)) {
    case 0:
    case 1:
    case 2:
        mirror_to_new_disk();
        return;
    case 3:
        simple(VS_CMD_MIRROR_DRAIN, choose(&w.c, 4) != 3);
        return;
    case 4:
        simple(VS_CMD_MIRROR_STOP, 0);
        return;
    case 5:
        simple(VS_CMD_RECORD_WRITTEN, choose(&w.c, 4) == 3 ? ENOSPC : 0);
        return;
    case 6:
        simple(VS_CMD_UNGATE, 0);
        return;
    case 7:
        (void)mirror_again(choose(&w.c, 2) ? VS_START_SPARE_DOUBT : 0);
        return;
    case 8:
        verify();
        return;
    case 9:
        grow();
        return;
    case 10:
    case 11:
        operate_rarely();
        return;
    default:
        switch_over();
    }
}

/* ---- the disks ---------------------------------------------------------------------- */

static void disturb(void)
{
    vs_disk *disk = w.disk[choose(&w.c, w.disks)];
    uint32_t op = choose(&w.c, VS_DISK_OPS);
    static const int errors[] = {0, EIO, ENOSPC, EIO};
    switch (choose(&w.c, 5)) {
    case 0:
        vs_test_disk_fault(disk, op, errors[choose(&w.c, 4)], (int)choose(&w.c, 4), (int)choose(&w.c, 4));
        return;
    case 1:
        vs_test_disk_hold(disk, op, 1);
        return;
    case 2:
        if (choose(&w.c, 4) != 3)
            return;
        vs_test_disk_spoil(disk, 4096ull * choose(&w.c, CAPACITY / 4096), 512ull * (1 + choose(&w.c, 8)));
        w.spoilt = true;
        return;
    default:
        vs_test_disk_hold(disk, op, 0);
        vs_test_disk_release(disk, op, 1 + (int)choose(&w.c, 100));
    }
}

static void calm(void)
{
    for (unsigned i = 0; i < w.disks; i++) {
        for (uint32_t op = 0; op < VS_DISK_OPS; op++) {
            vs_test_disk_fault(w.disk[i], op, 0, 0, 0);
            vs_test_disk_hold(w.disk[i], op, 0);
            vs_test_disk_release(w.disk[i], op, 1 << 20);
        }
    }
}

#endif
