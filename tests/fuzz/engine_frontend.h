/* SPDX-License-Identifier: Apache-2.0
 *
 * The frontends of fuzz_engine.c, mostly well-behaved: one that the guest runs
 * with, on split or packed rings, and others that come and go beside it.
 */
#ifndef VS_FUZZ_ENGINE_FRONTEND_H
#define VS_FUZZ_ENGINE_FRONTEND_H

#include <linux/vhost.h>
#include <linux/virtio_config.h>

#include "engine_world.h"

#define RING_SIZE 64
#define RINGS_END 0x8000 /* then the driver's headers and tables (driver_make) */
#define ATTACHMENTS 2    /* that may be the guest's */

/* Memory that a frontend shares beside the guest's, and how it sees that. */
struct shared {
    int fd;
    uint8_t *base;
    uint64_t bytes;
};

static struct shared record, dirty_log;
#define RECORD_BYTES ((uint64_t)LANES * VS_INFLIGHT_PACKED_RING_BYTES)
#define DIRTY_LOG_BYTES ((GUEST_ADDR + MEMORY_BYTES) / 4096 / 8)

static struct shared share(const char *name, uint64_t bytes)
{
    struct shared s = {.fd = memfd_create(name, MFD_CLOEXEC), .bytes = bytes};
    ENSURE(s.fd >= 0 && ftruncate(s.fd, (off_t)bytes) == 0);
    s.base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, s.fd, 0);
    ENSURE(s.base != MAP_FAILED);
    return s;
}

/* ---- rings --------------------------------------------------------------------- */

/* New ones, at the place of the former: the driver begins anew, whatever the engine thinks. */
static void rings_anew(bool packed)
{
    w.packed = packed;
    guest.taken = 0;
    memset(guest.base, 0, RINGS_END);
    for (unsigned i = 0; i < LANES; i++) {
        if (packed) {
            w.packed_ring[i] = packed_make(&guest, RING_SIZE, WRAP);
            driver_use_packed(&w.driver[i], &w.packed_ring[i]);
        } else {
            w.ring[i] = ring_make(&guest, RING_SIZE);
            driver_use_ring(&w.driver[i], &w.ring[i]);
        }
    }
    ENSURE(guest.taken <= RINGS_END);
}

static uint64_t base_of(unsigned lane)
{
    return w.packed ? (uint64_t)w.packed_ring[lane].used * 0x10001u : w.ring[lane].used->idx;
}

static struct vs_ring_addresses addresses_of(unsigned lane)
{
    const struct packed_driver *p = &w.packed_ring[lane];
    const struct ring *r = &w.ring[lane];
    if (w.packed)
        return (struct vs_ring_addresses){.desc = p->desc_at, .avail = p->driver_at, .used = p->device_at};
    return (struct vs_ring_addresses){.desc = r->desc_at, .avail = r->avail_at, .used = r->used_at};
}

/* ---- what it sends ---------------------------------------------------------------- */

static int some_fd(int right)
{
    int ends[2];
    if (!rarely(&w.c))
        return dup(right);
    switch (choose(&w.c, 4)) {
    case 0:
        return dup(guest.fd);
    case 1:
        if (pipe(ends) < 0)
            return -1;
        close(ends[1]);
        return ends[0];
    case 2:
        if (pipe(ends) < 0)
            return -1;
        close(ends[0]);
        return ends[1];
    default:
        return -1;
    }
}

static void set_memory(void)
{
    struct vs_command c = {.kind = VS_CMD_SET_MEM_TABLE, .fd = -1, .attachment = w.attachment, .memory.count = 2};
    c.memory.region[0] = guest_region(&guest, 0, BORDER);
    c.memory.region[1] = guest_region(&guest, BORDER, MEMORY_BYTES - BORDER);
    for (unsigned i = 0; i < 2; i++) {
        c.memory.region[i].guest_addr = mostly(&w.c, c.memory.region[i].guest_addr);
        c.memory.region[i].user_addr = mostly(&w.c, c.memory.region[i].user_addr);
        c.memory.region[i].bytes = mostly(&w.c, c.memory.region[i].bytes);
    }
    submit(&c);
}

static void change_memory(uint32_t kind)
{
    struct vs_command c = {.kind = kind, .fd = -1, .attachment = w.attachment, .memory.count = 1};
    c.memory.region[0] = guest_region(&guest, BORDER, MEMORY_BYTES - BORDER);
    c.memory.region[0].guest_addr = mostly(&w.c, c.memory.region[0].guest_addr);
    c.memory.region[0].bytes = mostly(&w.c, c.memory.region[0].bytes);
    submit(&c);
}

static void set_ring(unsigned lane, uint32_t kind, uint64_t base)
{
    struct vs_ring_addresses at = addresses_of(lane);
    struct vs_command c = {.kind = kind, .fd = -1, .attachment = w.attachment, .queue = (uint32_t)mostly(&w.c, lane)};
    switch (kind) {
    case VS_CMD_VRING_NUM:
        c.value = mostly(&w.c, RING_SIZE);
        break;
    case VS_CMD_VRING_ADDR:
        c.ring.desc = mostly(&w.c, USER_ADDR + at.desc);
        c.ring.avail = mostly(&w.c, USER_ADDR + at.avail);
        c.ring.used = mostly(&w.c, USER_ADDR + at.used);
        c.ring.log = choose(&w.c, 4) == 3 ? mostly(&w.c, GUEST_ADDR + at.used) : UINT64_MAX;
        break;
    case VS_CMD_VRING_BASE:
        c.value = mostly(&w.c, base);
        break;
    case VS_CMD_VRING_KICK:
        c.fd = some_fd(w.kick[lane]);
        break;
    case VS_CMD_VRING_CALL:
    case VS_CMD_VRING_ERR:
        c.fd = some_fd(w.call[lane]);
        break;
    default: /* enable */
        c.value = mostly(&w.c, 1);
    }
    submit(&c);
}

static void set_area(uint32_t kind, const struct shared *s)
{
    struct vs_command c = {.kind = kind, .fd = some_fd(s->fd), .attachment = w.attachment};
    c.area.bytes = mostly(&w.c, s->bytes);
    c.area.offset = mostly(&w.c, 0);
    c.area.queues = (uint32_t)mostly(&w.c, LANES);
    submit(&c);
}

static void log_memory(void)
{
    set_area(VS_CMD_SET_LOG_BASE, &dirty_log);
    submit(&(struct vs_command){.kind = VS_CMD_SET_LOG_FD, .fd = some_fd(w.call[0]), .attachment = w.attachment});
}

static void set_features(void)
{
    uint64_t features = 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_BLK_F_FLUSH | 1ull << VIRTIO_RING_F_INDIRECT_DESC;
    features |= w.packed ? 1ull << VIRTIO_F_RING_PACKED : 0;
    features |= choose(&w.c, 4) == 3 ? 1ull << VIRTIO_RING_F_EVENT_IDX : 0;
    features |= choose(&w.c, 4) == 3 ? 1ull << VHOST_F_LOG_ALL : 0;
    simple(VS_CMD_SET_FEATURES, mostly(&w.c, features));
}

static void attach(void)
{
    static const uint32_t order[] = {VS_CMD_VRING_NUM,  VS_CMD_VRING_ADDR, VS_CMD_VRING_BASE,
                                     VS_CMD_VRING_CALL, VS_CMD_VRING_KICK, VS_CMD_VRING_ENABLE};
    bool packed = choose(&w.c, 4) == 3 ? !w.packed : w.packed;
    if (packed != w.packed)
        rings_anew(packed);
    simple(VS_CMD_ATTACH, 0);
    set_features();
    set_memory();
    if (choose(&w.c, 2))
        set_area(VS_CMD_SET_INFLIGHT, &record);
    if (choose(&w.c, 4) == 3)
        log_memory();
    for (unsigned i = 0; i < LANES; i++)
        for (unsigned k = 0; k < sizeof order / sizeof order[0]; k++)
            set_ring(i, order[k], base_of(i));
}

/* ---- what it does while the guest runs ----------------------------------------------- */

/* Sets up a ring anew where it has stopped, if that was told in time: a disk may hold what is in flight. */
static void restart_ring(unsigned lane)
{
    uint64_t base = base_of(lane);
    struct answer a = {.result = -ETIMEDOUT};
    uint64_t token =
        submit(&(struct vs_command){.kind = VS_CMD_VRING_STOP, .fd = -1, .attachment = w.attachment, .queue = lane});
    while (token && !answered(token, &a) && next_event(20))
        ;
    set_ring(lane, VS_CMD_VRING_BASE, a.result == 0 ? a.value : base);
    set_ring(lane, VS_CMD_VRING_KICK, 0);
}

/* What was set is what its config space shows, at once. */
static void exchange_write_cache(void)
{
    unsigned mode = choose(&w.c, 2);
    int rc = command(VS_CMD_SET_WRITE_CACHE, mode);
    uint64_t token = simple(VS_CMD_GET_WRITE_CACHE, 0);
    struct answer a;
    if (!token)
        return;
    a = wait_for(token);
    ENSURE(a.result < 0 || a.value <= 1);
    ENSURE(rc < 0 || (a.result == 0 && a.value == mode));
}

/* Another one, as far as it gets: it looks, it sets, it sets up half a device. */
static void stranger(void)
{
    unsigned kinds = VS_CMD_SET_WRITE_CACHE - VS_CMD_ATTACH + 1;
    struct vs_command c = {.kind = VS_CMD_ATTACH + choose(&w.c, kinds), .fd = -1, .queue = choose(&w.c, LANES + 1)};
    c.attachment = ATTACHMENTS + choose(&w.c, VS_MAX_ATTACHMENTS - ATTACHMENTS + 2);
    if (c.kind == VS_CMD_SET_MEM_TABLE || c.kind == VS_CMD_ADD_MEM_REGION || c.kind == VS_CMD_REMOVE_MEM_REGION) {
        c.memory.count = 1;
        c.memory.region[0] = guest_region(&guest, 0, MEMORY_BYTES);
    } else if (c.kind != VS_CMD_VRING_ADDR && c.kind != VS_CMD_SET_INFLIGHT && c.kind != VS_CMD_SET_LOG_BASE) {
        c.value = choose(&w.c, 3);
    }
    submit(&c);
}

/* The receiving side of a live migration takes the guest over, or the same frontend connects again. */
static void frontend_again(void)
{
    simple(VS_CMD_DETACH, 0);
    w.attachment = choose(&w.c, ATTACHMENTS);
    attach();
}

/* Takes the file away from under what the engine has mapped of it, for a moment. What was there is zero then. */
static void shrink(int fd, uint64_t to, uint64_t bytes)
{
    static const uint64_t one = 1;
    ENSURE(ftruncate(fd, (off_t)to) == 0);
    for (unsigned i = 0; i < LANES; i++)
        if (write(w.kick[i], &one, sizeof one) < 0)
            ENSURE(errno == EAGAIN);
    usleep(300);
    ENSURE(ftruncate(fd, (off_t)bytes) == 0);
}

static void take_memory_away(void)
{
    if (!rarely(&w.c))
        return;
    switch (choose(&w.c, 4)) {
    case 0:
        shrink(guest.fd, BORDER, MEMORY_BYTES);
        return;
    case 1:
        shrink(guest.fd, 0, MEMORY_BYTES);
        rings_anew(w.packed);
        return;
    case 2:
        shrink(record.fd, 0, record.bytes);
        return;
    default:
        shrink(dirty_log.fd, 0, dirty_log.bytes);
    }
}

static void frontend(void)
{
    static const uint32_t kinds[] = {VS_CMD_VRING_ENABLE, VS_CMD_VRING_STOP, VS_CMD_VRING_BASE, VS_CMD_VRING_KICK,
                                     VS_CMD_VRING_CALL,   VS_CMD_VRING_ERR,  VS_CMD_VRING_NUM,  VS_CMD_VRING_ADDR};
    unsigned lane = choose(&w.c, LANES);
    switch (choose(&w.c, 16)) {
    case 0:
        simple(VS_CMD_VRING_ENABLE, choose(&w.c, 2));
        return;
    case 1:
        restart_ring(lane);
        return;
    case 2:
        set_memory();
        return;
    case 3:
    case 4:
        change_memory(choose(&w.c, 2) ? VS_CMD_ADD_MEM_REGION : VS_CMD_REMOVE_MEM_REGION);
        return;
    case 5:
        simple(VS_CMD_RESET, 0);
        return;
    case 6:
        exchange_write_cache();
        return;
    case 7:
        frontend_again();
        return;
    case 8:
        simple(VS_CMD_SET_FEATURES, choose_raw(&w.c, 8));
        return;
    case 9:
        stranger();
        return;
    case 10:
        set_area(VS_CMD_SET_INFLIGHT, &record);
        return;
    case 11: /* mostly about its beginning */
        record.base[choose_raw(&w.c, 2) % (choose(&w.c, 4) ? 256 : RECORD_BYTES)] = (uint8_t)choose_raw(&w.c, 1);
        return;
    case 12:
        log_memory();
        return;
    case 13:
        set_features();
        return;
    case 14:
        take_memory_away();
        return;
    default:
        set_ring(lane, kinds[choose(&w.c, 8)], base_of(lane));
    }
}

#endif
