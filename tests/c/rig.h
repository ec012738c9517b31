/* SPDX-License-Identifier: Apache-2.0
 *
 * An engine with a guest attached to it: the control plane's side (commands
 * and events, for one thread) and the driver's side (lanes, one thread each).
 */
#ifndef VS_TEST_RIG_H
#define VS_TEST_RIG_H

#include <errno.h>
#include <sys/eventfd.h>
#include <time.h>

#include "patience.h"
#include "ring.h"
#include "testing.h"

#define LANES 4
#ifndef LANE_DEPTH
#define LANE_DEPTH 16
#endif
#define LANE_RING (4 * LANE_DEPTH)
#define SLOT_BYTES 65536u
#define DISK_BYTES (8ull << 20)
#define UNHURRIED_US 600000000ull /* of a time limit that the test is not about, however starved it is */

#define F_BLK_FLUSH (1ull << VIRTIO_BLK_F_FLUSH)
#define F_INDIRECT (1ull << VIRTIO_RING_F_INDIRECT_DESC)
#define F_EVENT_IDX (1ull << VIRTIO_RING_F_EVENT_IDX)
#define F_VERSION_1 (1ull << 32)
#define F_USUAL (F_BLK_FLUSH | F_VERSION_1)

/* For the next rig; its flushes come by themselves. */
static uint64_t rig_checkpoint_us = 50000;

/* A queue as its driver sees it. A request in slot s uses the descriptors from 3 s on. */
struct lane {
    struct ring ring;
    int kick_fd, call_fd;
    bool event_idx, indirect;
    uint64_t at; /* slots: header, status and data */
    uint64_t seed;
    unsigned in_flight;
    uint64_t done, errors;
};

struct rig {
    vs_engine *engine;
    vs_disk *source, *destination; /* references of our own: these can be looked at */
    struct guest *guest;           /* on the heap: rings point to it, and a rig may be copied */
    struct lane lane[LANES];
    unsigned lanes;
    uint32_t attachment;
    uint64_t features;
    /* Events that are no completion of a command. */
    struct vs_event last[VS_EV_SOURCE_CLOSED + 1];
    unsigned seen[VS_EV_SOURCE_CLOSED + 1];
    uint32_t state;
};

/* ---- the control plane's side ------------------------------------------------ */

static inline void rig_note(struct rig *r, const struct vs_event *e)
{
    CHECK(e->kind >= VS_EV_DONE && e->kind <= VS_EV_SOURCE_CLOSED);
    r->last[e->kind] = *e;
    r->seen[e->kind]++;
    if (e->kind == VS_EV_STATE)
        r->state = (uint32_t)e->value;
}

/* The next event; false: none within the time. */
static inline bool rig_event(struct rig *r, struct vs_event *out, int wait_ms)
{
    struct pollfd p = {.fd = vs_engine_event_fd(r->engine), .events = POLLIN};
    while (!vs_engine_next_event(r->engine, out))
        if (poll(&p, 1, wait_ms) == 0)
            return false;
    rig_note(r, out);
    return true;
}

static inline void rig_await_event(struct rig *r, struct vs_event *out)
{
    while (!rig_event(r, out, 0))
        CHECK(patience_readable(vs_engine_event_fd(r->engine)));
}

static inline uint64_t rig_submit(struct rig *r, const struct vs_command *c)
{
    uint64_t token = vs_engine_submit(r->engine, c);
    CHECK(token != 0);
    return token;
}

static inline struct vs_event rig_wait(struct rig *r, uint64_t token)
{
    struct vs_event e;
    do
        rig_await_event(r, &e);
    while (e.kind != VS_EV_DONE || e.token != token);
    return e;
}

static inline int rig_command(struct rig *r, struct vs_command c)
{
    return rig_wait(r, rig_submit(r, &c)).result;
}

static inline int rig_simple(struct rig *r, uint32_t kind, uint64_t value)
{
    return rig_command(r, (struct vs_command){.kind = kind, .fd = -1, .attachment = r->attachment, .value = value});
}

static inline int rig_exchange(struct rig *r, uint32_t flags)
{
    return rig_command(r, (struct vs_command){.kind = VS_CMD_EXCHANGE, .fd = -1, .exchange.flags = flags});
}

static inline int rig_vring(struct rig *r, uint32_t kind, unsigned queue, uint64_t value, int fd)
{
    return rig_command(
        r, (struct vs_command){.kind = kind, .attachment = r->attachment, .queue = queue, .value = value, .fd = fd});
}

static inline struct vs_snapshot rig_snapshot(struct rig *r)
{
    struct vs_snapshot s;
    CHECK_EQUAL(rig_simple(r, VS_CMD_SNAPSHOT, 0), 0);
    vs_engine_snapshot(r->engine, &s);
    return s;
}

static inline void rig_wait_state(struct rig *r, uint32_t state)
{
    struct vs_event e;
    while (r->state != state)
        rig_await_event(r, &e);
}

static inline void rig_wait_seen(struct rig *r, uint32_t kind, unsigned count)
{
    struct vs_event e;
    while (r->seen[kind] < count)
        rig_await_event(r, &e);
}

static inline struct vs_engine_config rig_config(void)
{
    return (struct vs_engine_config){.capacity_bytes = DISK_BYTES,
                                     .log_bytes = VS_REQUEST_BYTES_MAX,
                                     .destination_timeout_us = UNHURRIED_US,
                                     .stop_timeout_us = UNHURRIED_US,
                                     .max_lag_us = 500000,
                                     .block_bytes = 512,
                                     .queues_max = LANES,
                                     .dirty_region_bytes = 65536,
                                     .checkpoint_us = rig_checkpoint_us,
                                     .copy_depth = 4,
                                     .threads = 1,
                                     .writeback = 1,
                                     .serial = "rig"};
}

static inline struct rig rig_make(const struct vs_engine_config *config, vs_disk *source)
{
    struct rig r = {.source = source};
    const char *step = "";
    int rc = vs_engine_create(config, source, &r.engine, &step);
    if (rc < 0)
        printf("# vs_engine_create: %s: %s\n", step, strerror(-rc));
    CHECK_EQUAL(rc, 0);
    return r;
}

struct ring_place {
    uint32_t num;
    uint64_t desc_at, avail_at, used_at; /* in the guest's memory, as all places here */
    int kick_fd, call_fd;                /* copies of them are sent */
};

static inline void rig_start_ring(struct rig *r, unsigned i, const struct ring_place *p, uint16_t base)
{
    struct vs_command addr = {.kind = VS_CMD_VRING_ADDR,
                              .attachment = r->attachment,
                              .queue = i,
                              .fd = -1,
                              .ring.desc = USER_ADDR + p->desc_at,
                              .ring.avail = USER_ADDR + p->avail_at,
                              .ring.used = USER_ADDR + p->used_at,
                              .ring.log = UINT64_MAX};
    CHECK_EQUAL(rig_vring(r, VS_CMD_VRING_NUM, i, p->num, -1), 0);
    CHECK_EQUAL(rig_command(r, addr), 0);
    CHECK_EQUAL(rig_vring(r, VS_CMD_VRING_BASE, i, base, -1), 0);
    CHECK_EQUAL(rig_vring(r, VS_CMD_VRING_CALL, i, 0, dup(p->call_fd)), 0);
    CHECK_EQUAL(rig_vring(r, VS_CMD_VRING_KICK, i, 0, dup(p->kick_fd)), 0);
    CHECK_EQUAL(rig_vring(r, VS_CMD_VRING_ENABLE, i, 1, -1), 0);
}

static inline void lane_setup(struct rig *r, unsigned i, uint16_t base)
{
    struct lane *l = &r->lane[i];
    struct ring_place place = {.num = l->ring.num,
                               .desc_at = l->ring.desc_at,
                               .avail_at = l->ring.avail_at,
                               .used_at = l->ring.used_at,
                               .kick_fd = l->kick_fd,
                               .call_fd = l->call_fd};
    rig_start_ring(r, i, &place, base);
}

static inline void rig_attach(struct rig *r, unsigned lanes, uint64_t features)
{
    uint64_t room = LANE_DEPTH * (SLOT_BYTES + 4096ull);
    r->lanes = lanes;
    r->features = features;
    r->guest = malloc(sizeof *r->guest);
    CHECK(r->guest);
    *r->guest = guest_make(lanes * (room + (1u << 17)));
    CHECK_EQUAL(rig_simple(r, VS_CMD_ATTACH, 0), 0);
    CHECK_EQUAL(rig_simple(r, VS_CMD_SET_FEATURES, features), 0);
    struct vs_command table = {.kind = VS_CMD_SET_MEM_TABLE, .attachment = r->attachment, .fd = -1, .memory.count = 2};
    table.memory.region[0] = guest_region(r->guest, 0, r->guest->bytes / 2);
    table.memory.region[1] = guest_region(r->guest, r->guest->bytes / 2, r->guest->bytes - r->guest->bytes / 2);
    CHECK_EQUAL(rig_command(r, table), 0);
    for (unsigned i = 0; i < lanes; i++) {
        struct lane *l = &r->lane[i];
        *l = (struct lane){.ring = ring_make(r->guest, LANE_RING),
                           .event_idx = features & F_EVENT_IDX,
                           .indirect = features & F_INDIRECT,
                           .kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
                           .call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
                           .seed = 1000 + i};
        l->at = guest_take(r->guest, room, 4096);
        l->ring.published = l->ring.reaped = (uint16_t)(65500 + i);
        l->ring.avail->idx = l->ring.used->idx = l->ring.published;
        lane_setup(r, i, l->ring.published);
    }
}

/* The driver's side of a guest that is not attached any more. */
static inline void rig_forget_guest(struct rig *r)
{
    for (unsigned i = 0; i < r->lanes; i++) {
        close(r->lane[i].kick_fd);
        close(r->lane[i].call_fd);
    }
    guest_end(r->guest);
    free(r->guest);
}

static inline void rig_detach(struct rig *r)
{
    CHECK_EQUAL(rig_simple(r, VS_CMD_DETACH, 0), 0);
    rig_forget_guest(r);
}

/* ---- the driver's side --------------------------------------------------------- */

static inline uint8_t *lane_data(struct lane *l, unsigned slot)
{
    return l->ring.guest->base + l->at + (uint64_t)slot * (SLOT_BYTES + 4096) + 4096;
}

static inline uint8_t *lane_header(struct lane *l, unsigned slot)
{
    return lane_data(l, slot) - 4096;
}

static inline uint8_t lane_status(struct lane *l, unsigned slot)
{
    return lane_header(l, slot)[16];
}

static inline void lane_kick(struct lane *l)
{
    uint64_t one = 1;
    if (write(l->kick_fd, &one, sizeof one) < 0)
        CHECK(errno == EAGAIN);
}

/* Available, but not published yet. */
static inline void lane_put(struct lane *l, unsigned slot, uint32_t type, uint64_t sector, uint32_t bytes)
{
    struct virtio_blk_outhdr header = {.type = type, .sector = sector};
    uint64_t at = GUEST_ADDR + (uint64_t)(lane_header(l, slot) - l->ring.guest->base);
    unsigned first = 3 * slot, n = 0;
    struct vring_desc d[3];
    bool reads = type == VIRTIO_BLK_T_IN || type == VIRTIO_BLK_T_GET_ID;
    memcpy(lane_header(l, slot), &header, sizeof header);
    lane_header(l, slot)[16] = 0xff;
    ring_desc(&d[n], at, 16, VRING_DESC_F_NEXT, first + n + 1);
    n++;
    if (bytes) {
        ring_desc(&d[n], at + 4096, bytes, VRING_DESC_F_NEXT | (reads ? VRING_DESC_F_WRITE : 0u), first + n + 1);
        n++;
    }
    ring_desc(&d[n], at + 16, 1, VRING_DESC_F_WRITE, 0);
    n++;
    if (l->indirect) {
        for (unsigned i = 0; i < n; i++)
            d[i].next = (uint16_t)(i + 1);
        memcpy(lane_header(l, slot) + 64, d, sizeof d);
        ring_desc(&l->ring.desc[first], at + 64, 16 * n, VRING_DESC_F_INDIRECT, 0);
    } else {
        memcpy(&l->ring.desc[first], d, 16 * n);
    }
    ring_put(&l->ring, first);
    l->in_flight++;
}

/* Shows the device all that was put since the ring stood at "old", and kicks when it asks for that: a lost
 * wake-up would show as a hang. */
static inline void lane_publish(struct lane *l, uint16_t old)
{
    ring_publish(&l->ring);
    if (l->event_idx
            ? vring_need_event(__atomic_load_n(ring_avail_event(&l->ring), __ATOMIC_RELAXED), l->ring.published, old)
            : !(__atomic_load_n(&l->ring.used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY))
        lane_kick(l);
}

static inline void lane_send(struct lane *l, unsigned slot, uint32_t type, uint64_t sector, uint32_t bytes)
{
    uint16_t old = l->ring.published;
    lane_put(l, slot, type, sector, bytes);
    lane_publish(l, old);
}

/* The slot of a completed request, or -1: none yet. */
static inline int lane_poll(struct lane *l)
{
    struct vring_used_elem e;
    if (!ring_reap(&l->ring, &e))
        return -1;
    CHECK(e.id % 3 == 0 && e.id < 3 * LANE_DEPTH);
    CHECK(l->in_flight > 0);
    l->in_flight--;
    l->done++;
    CHECK(lane_status(l, e.id / 3) != 0xff);
    if (lane_status(l, e.id / 3) != VIRTIO_BLK_S_OK)
        l->errors++;
    return (int)(e.id / 3);
}

/* Waits for a notification as a driver does: says so, looks again, sleeps. */
static inline int lane_wait(struct lane *l)
{
    uint64_t counter;
    for (;;) {
        int slot = lane_poll(l);
        if (slot >= 0)
            return slot;
        __atomic_store_n(ring_used_event(&l->ring), l->ring.reaped, __ATOMIC_RELAXED);
        atomic_thread_fence(memory_order_seq_cst);
        slot = lane_poll(l);
        if (slot >= 0)
            return slot;
        if (!patience_readable(l->call_fd))
            test_failed(__FILE__, __LINE__, "a request completes and its driver is notified");
        if (read(l->call_fd, &counter, sizeof counter) < 0)
            CHECK(errno == EAGAIN);
    }
}

static inline void lane_quiet(struct lane *l)
{
    while (l->in_flight)
        lane_wait(l);
}

/* One request, to its end: the status byte. */
static inline uint8_t lane_do(struct lane *l, uint32_t type, uint64_t sector, uint32_t bytes)
{
    CHECK_EQUAL(l->in_flight, 0);
    lane_send(l, 0, type, sector, bytes);
    CHECK_EQUAL(lane_wait(l), 0);
    return lane_status(l, 0);
}

static inline uint8_t lane_fill(struct lane *l, uint64_t sector, uint32_t bytes, uint8_t with)
{
    memset(lane_data(l, 0), with, bytes);
    return lane_do(l, VIRTIO_BLK_T_OUT, sector, bytes);
}

static inline uint8_t lane_flush(struct lane *l)
{
    return lane_do(l, VIRTIO_BLK_T_FLUSH, 0, 0);
}

/* ---- what the disks hold --------------------------------------------------------- */

enum cut { CUT_NONE = 0, CUT_RANDOM = 1, CUT_ALL = 2 };

static inline bool disk_holds(vs_disk *disk, uint64_t sector, uint32_t bytes, uint8_t value, enum cut cut)
{
    static uint8_t content[DISK_BYTES];
    CHECK_EQUAL(vs_test_disk_read(disk, sector * 512, bytes, cut, 1, content), 0);
    return content[0] == value && memcmp(content, content + 1, bytes - 1) == 0;
}

static inline bool disks_equal(vs_disk *a, vs_disk *b, enum cut cut)
{
    static uint8_t one[DISK_BYTES], other[DISK_BYTES];
    CHECK_EQUAL(vs_test_disk_read(a, 0, DISK_BYTES, cut, 1, one), 0);
    CHECK_EQUAL(vs_test_disk_read(b, 0, DISK_BYTES, cut, 1, other), 0);
    return memcmp(one, other, DISK_BYTES) == 0;
}

/* ---- test disks ------------------------------------------------------------------- */

static inline vs_disk *rig_test_disk(void)
{
    vs_disk *disk = vs_test_disk(DISK_BYTES, 512);
    CHECK(disk);
    vs_test_disk_keep(disk);
    return disk;
}

static inline struct rig rig_begin(unsigned lanes, uint64_t features)
{
    struct vs_engine_config config = rig_config();
    struct rig r = rig_make(&config, rig_test_disk());
    rig_attach(&r, lanes, features);
    return r;
}

static inline int rig_mirror_start(struct rig *r, vs_disk *destination)
{
    return rig_command(r, (struct vs_command){.kind = VS_CMD_MIRROR_START, .fd = -1, .start.disk = destination});
}

static inline void rig_mirror(struct rig *r)
{
    r->destination = rig_test_disk();
    CHECK_EQUAL(rig_mirror_start(r, r->destination), 0);
    rig_wait_state(r, VS_STEADY);
}

static inline void rig_end(struct rig *r)
{
    rig_detach(r);
    vs_engine_destroy(r->engine);
    vs_test_disk_drop(r->source);
    if (r->destination)
        vs_test_disk_drop(r->destination);
}

#endif
