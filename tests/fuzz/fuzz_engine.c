/* SPDX-License-Identifier: Apache-2.0
 *
 * The whole engine through shim_api.h: a mostly well-behaved driver and
 * frontend, commands in any order, disks that fail, hang and come back.
 *
 * Required: nothing crashes, every command that cannot wait is answered, the
 * counts keep their order, the engine ends; and when the mirror is steady at
 * the end, and drained, both disks hold the same.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <sys/eventfd.h>

#include "driver.h"
#include "testing.h"

#define MEMORY_BYTES (1u << 20)
#define BORDER (MEMORY_BYTES / 2)
#define CAPACITY (1u << 19)
#define LANES 2
#define DISKS_MAX 6
#define PATIENCE_MS 60000

#define ENSURE(condition)                                                     \
    do {                                                                      \
        if (!(condition)) {                                                   \
            fprintf(stderr, "required: %s, line %d\n", #condition, __LINE__); \
            __builtin_trap();                                                 \
        }                                                                     \
    } while (0)

static struct world {
    struct choices c;
    vs_engine *engine;
    vs_disk *disk[DISKS_MAX]; /* every one that there ever was; a reference of ours each */
    unsigned disks;
    int source, destination; /* which of them; destination is meaningful while mirrored */
    struct ring ring[LANES];
    struct driver driver[LANES];
    int kick[LANES], call[LANES];
    uint32_t state;
    uint64_t answered[64]; /* tokens of late, for wait_for() */
    int results[64];
    unsigned answers;
} w;

static struct guest guest;
static int record_fd = -1; /* the record of requests in flight, and how a frontend sees it */
static uint8_t *record;
#define RECORD_BYTES (4ull * VS_INFLIGHT_RING_BYTES)

/* ---- commands ------------------------------------------------------------------ */

static bool next_event(int wait_ms)
{
    struct pollfd p = {.fd = vs_engine_event_fd(w.engine), .events = POLLIN};
    struct vs_event e;
    while (!vs_engine_next_event(w.engine, &e))
        if (poll(&p, 1, wait_ms) == 0)
            return false;
    if (e.kind == VS_EV_STATE)
        w.state = (uint32_t)e.value;
    if (e.kind == VS_EV_DONE) {
        w.answered[w.answers % 64] = e.token;
        w.results[w.answers++ % 64] = e.result;
    }
    return true;
}

static void close_all(const struct vs_command *c)
{
    if (c->fd >= 0)
        close(c->fd);
    if (c->kind != VS_CMD_SET_MEM_TABLE && c->kind != VS_CMD_ADD_MEM_REGION && c->kind != VS_CMD_REMOVE_MEM_REGION)
        return;
    for (unsigned i = 0; i < c->memory.count; i++)
        close(c->memory.region[i].fd);
}

static uint64_t submit(const struct vs_command *c)
{
    uint64_t token = vs_engine_submit(w.engine, c);
    if (!token)
        close_all(c);
    return token;
}

static int wait_for(uint64_t token)
{
    ENSURE(token);
    for (;;) {
        for (unsigned i = 0; i < 64 && i < w.answers; i++)
            if (w.answered[i] == token)
                return w.results[i];
        ENSURE(next_event(PATIENCE_MS));
    }
}

static uint64_t simple(uint32_t kind, uint64_t value)
{
    return submit(&(struct vs_command){.kind = kind, .fd = -1, .value = value});
}

static void look(void)
{
    struct vs_snapshot s;
    struct vs_queue_stats q;
    uint64_t token = simple(VS_CMD_SNAPSHOT, 0);
    if (!token)
        return;
    wait_for(token);
    vs_engine_snapshot(w.engine, &s);
    vs_engine_queue_stats(w.engine, 0, &q);
    ENSURE(s.counts.source_flushed <= s.counts.source_generation);
    ENSURE(s.counts.flush_request <= s.counts.source_generation);
    ENSURE(s.doubt_count <= VS_RANGES_MAX);
    ENSURE(!s.counts.mirrored_known || (s.counts.writes_flushed <= s.counts.writes_mirrored &&
                                        s.counts.writes_mirrored <= s.counts.source_generation));
    ENSURE(s.copy_bytes_done <= s.copy_bytes_total && s.copy_bytes_sparse <= s.copy_bytes_done);
}

/* ---- the frontend ---------------------------------------------------------------- */

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
    struct vs_command c = {.kind = VS_CMD_SET_MEM_TABLE, .fd = -1, .memory.count = 2};
    c.memory.region[0] = guest_region(&guest, 0, BORDER);
    c.memory.region[1] = guest_region(&guest, BORDER, MEMORY_BYTES - BORDER);
    for (unsigned i = 0; i < 2; i++) {
        c.memory.region[i].guest_addr = mostly(&w.c, c.memory.region[i].guest_addr);
        c.memory.region[i].user_addr = mostly(&w.c, c.memory.region[i].user_addr);
        c.memory.region[i].bytes = mostly(&w.c, c.memory.region[i].bytes);
    }
    submit(&c);
}

static void set_ring(unsigned i, uint32_t kind)
{
    const struct ring *r = &w.ring[i];
    struct vs_command c = {.kind = kind, .fd = -1, .queue = (uint32_t)mostly(&w.c, i)};
    switch (kind) {
    case VS_CMD_VRING_NUM:
        c.value = mostly(&w.c, r->num);
        break;
    case VS_CMD_VRING_ADDR:
        c.ring.desc = mostly(&w.c, USER_ADDR + r->desc_at);
        c.ring.avail = mostly(&w.c, USER_ADDR + r->avail_at);
        c.ring.used = mostly(&w.c, USER_ADDR + r->used_at);
        break;
    case VS_CMD_VRING_BASE:
        c.value = mostly(&w.c, r->used->idx);
        break;
    case VS_CMD_VRING_KICK:
        c.fd = some_fd(w.kick[i]);
        break;
    case VS_CMD_VRING_CALL:
    case VS_CMD_VRING_ERR:
        c.fd = some_fd(w.call[i]);
        break;
    default: /* enable */
        c.value = mostly(&w.c, 1);
    }
    submit(&c);
}

static void set_record(void)
{
    struct vs_command c = {.kind = VS_CMD_SET_INFLIGHT, .fd = some_fd(record_fd)};
    c.area.bytes = mostly(&w.c, RECORD_BYTES);
    c.area.offset = mostly(&w.c, 0);
    c.area.queues = (uint32_t)mostly(&w.c, LANES);
    submit(&c);
}

static void attach(void)
{
    static const uint32_t order[] = {VS_CMD_VRING_NUM,  VS_CMD_VRING_ADDR, VS_CMD_VRING_BASE,
                                     VS_CMD_VRING_CALL, VS_CMD_VRING_KICK, VS_CMD_VRING_ENABLE};
    uint64_t features = 1ull << 32 | 1ull << VIRTIO_BLK_F_FLUSH | 1ull << VIRTIO_RING_F_INDIRECT_DESC;
    simple(VS_CMD_ATTACH, 0);
    simple(VS_CMD_SET_FEATURES, mostly(&w.c, features));
    set_memory();
    if (choose(&w.c, 2))
        set_record();
    for (unsigned i = 0; i < LANES; i++)
        for (unsigned k = 0; k < sizeof order / sizeof order[0]; k++)
            set_ring(i, order[k]);
}

static void frontend(void)
{
    static const uint32_t kinds[] = {VS_CMD_VRING_ENABLE, VS_CMD_VRING_STOP, VS_CMD_VRING_BASE, VS_CMD_VRING_KICK,
                                     VS_CMD_VRING_CALL,   VS_CMD_VRING_ERR,  VS_CMD_VRING_NUM,  VS_CMD_VRING_ADDR};
    struct vs_command c = {.fd = -1, .memory.count = 1};
    unsigned lane = choose(&w.c, LANES);
    switch (choose(&w.c, 13)) {
    case 10:
        set_record();
        return;
    case 11:
        record[choose_raw(&w.c, 2) % RECORD_BYTES] = (uint8_t)choose_raw(&w.c, 1);
        return;
    case 0:
        simple(VS_CMD_VRING_ENABLE, choose(&w.c, 2));
        return;
    case 1:
        submit(&(struct vs_command){.kind = VS_CMD_VRING_STOP, .fd = -1, .queue = lane});
        set_ring(lane, VS_CMD_VRING_BASE);
        set_ring(lane, VS_CMD_VRING_KICK);
        return;
    case 2:
        set_memory();
        return;
    case 3:
    case 4:
        c.kind = choose(&w.c, 2) ? VS_CMD_ADD_MEM_REGION : VS_CMD_REMOVE_MEM_REGION;
        c.memory.region[0] = guest_region(&guest, BORDER, MEMORY_BYTES - BORDER);
        c.memory.region[0].guest_addr = mostly(&w.c, c.memory.region[0].guest_addr);
        c.memory.region[0].bytes = mostly(&w.c, c.memory.region[0].bytes);
        submit(&c);
        return;
    case 5:
        simple(VS_CMD_RESET, 0);
        return;
    case 6:
        simple(VS_CMD_SET_WRITE_CACHE, choose(&w.c, 2));
        return;
    case 7:
        simple(VS_CMD_DETACH, 0);
        attach();
        return;
    case 8:
        simple(VS_CMD_SET_FEATURES, choose_raw(&w.c, 8));
        return;
    case 9: /* another frontend's, as far as it gets */
        submit(&(struct vs_command){.kind = VS_CMD_ATTACH + choose(&w.c, 4), .fd = -1, .attachment = choose(&w.c, 10)});
        return;
    default:
        set_ring(lane, kinds[choose(&w.c, 8)]);
    }
}

/* ---- the guest ----------------------------------------------------------------------- */

static void drive(void)
{
    unsigned lane = choose(&w.c, LANES), burst = 1 + choose(&w.c, 6);
    uint64_t one = 1;
    struct vring_used_elem e;
    while (burst--)
        driver_put_request(&w.driver[lane]);
    driver_poke(&w.driver[lane]);
    ring_publish(&w.ring[lane]);
    if (write(w.kick[lane], &one, sizeof one) < 0)
        ENSURE(errno == EAGAIN);
    while (ring_reap(&w.ring[lane], &e))
        ;
}

/* ---- the operator, and the disks -------------------------------------------------------- */

static vs_disk *new_disk(void)
{
    vs_disk *disk = vs_test_disk(CAPACITY, 512);
    ENSURE(disk);
    vs_test_disk_keep(disk);
    w.disk[w.disks++] = disk;
    return disk;
}

static void exchange(bool keep)
{
    static uint64_t mark;
    uint64_t value = mark + 1;
    uint64_t token = submit(&(struct vs_command){.kind = VS_CMD_EXCHANGE, .fd = -1, .exchange = {keep, &mark, value}});
    int rc = token ? wait_for(token) : -EAGAIN;
    ENSURE((__atomic_load_n(&mark, __ATOMIC_ACQUIRE) == value) == (rc == 0));
    if (rc == 0) {
        int old = w.source;
        w.source = w.destination;
        w.destination = old;
    } else if (choose(&w.c, 8) != 7) {
        simple(VS_CMD_UNGATE, 0);
    }
}

/* A destination that is slow or bad from the beginning, so that copy and guest meet. */
static void disturb_copy(vs_disk *destination)
{
    uint32_t op = choose(&w.c, 2) ? VS_DISK_WRITE : VS_DISK_ZERO;
    switch (choose(&w.c, 6)) {
    case 1:
    case 2:
        vs_test_disk_hold(destination, op, 1);
        return;
    case 3:
        vs_test_disk_hold(w.disk[w.source], VS_DISK_READ, 1);
        return;
    case 4:
        vs_test_disk_fault(destination, choose(&w.c, VS_DISK_OPS), EIO, (int)choose(&w.c, 8), 1);
        return;
    case 5:
        vs_test_disk_fault(w.disk[w.source], VS_DISK_READ, EIO, (int)choose(&w.c, 8), 1);
        return;
    default:
        return;
    }
}

static void operate(void)
{
    switch (choose(&w.c, 10)) {
    case 0:
    case 1:
    case 2:
        if (w.disks < DISKS_MAX) {
            vs_disk *disk = new_disk();
            disturb_copy(disk);
            uint64_t token = submit(&(struct vs_command){.kind = VS_CMD_MIRROR_START, .fd = -1, .start.disk = disk});
            if (!token || wait_for(token) < 0)
                vs_disk_close(disk); /* the engine's reference, still ours */
            else
                w.destination = (int)w.disks - 1;
        }
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
        simple(VS_CMD_MIRROR_SPEED, choose(&w.c, 2) ? 0 : 1u << 22);
        return;
    default: /* a switch, as it should be done */
        simple(VS_CMD_MIRROR_DRAIN, choose(&w.c, 4) != 3);
        uint64_t token = simple(VS_CMD_GATE, 1000 * (1 + choose(&w.c, 20)));
        /* Mostly it waits for the gate by itself. */
        if (choose(&w.c, 3) == 2 && token && wait_for(token) == 0 && choose(&w.c, 8) == 7)
            return; /* and left like that */
        exchange(choose(&w.c, 2));
    }
}

static void disturb(void)
{
    vs_disk *disk = w.disk[choose(&w.c, w.disks)];
    uint32_t op = choose(&w.c, VS_DISK_OPS);
    static const int errors[] = {0, EIO, ENOSPC, EIO};
    switch (choose(&w.c, 4)) {
    case 0:
        vs_test_disk_fault(disk, op, errors[choose(&w.c, 4)], (int)choose(&w.c, 4), (int)choose(&w.c, 4));
        return;
    case 1:
        vs_test_disk_hold(disk, op, 1);
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

/* Steady and drained: the same on both, unless a range is in doubt. */
static void compare(void)
{
    static uint8_t one[CAPACITY], other[CAPACITY];
    struct vs_snapshot s;
    uint64_t token;
    simple(VS_CMD_UNGATE, 0);
    token = simple(VS_CMD_GATE, 5000000);
    if (!token || wait_for(token) < 0)
        return;
    token = simple(VS_CMD_SNAPSHOT, 0);
    if (!token)
        return;
    wait_for(token);
    vs_engine_snapshot(w.engine, &s);
    ENSURE(s.counts.writes_mirrored == s.counts.source_generation);
    ENSURE(vs_test_disk_read(w.disk[w.source], 0, CAPACITY, 0, 0, one) == 0);
    ENSURE(vs_test_disk_read(w.disk[w.destination], 0, CAPACITY, 0, 0, other) == 0);
    for (unsigned i = 0; i < s.unreadable_count; i++) {
        ENSURE(s.unreadable[i].offset <= CAPACITY && s.unreadable[i].length <= CAPACITY - s.unreadable[i].offset);
        memset(one + s.unreadable[i].offset, 0, s.unreadable[i].length);
        memset(other + s.unreadable[i].offset, 0, s.unreadable[i].length);
    }
    for (unsigned i = 0; i < s.doubt_count; i++) {
        ENSURE(s.doubt[i].offset <= CAPACITY && s.doubt[i].length <= CAPACITY - s.doubt[i].offset);
        memset(one + s.doubt[i].offset, 0, s.doubt[i].length);
        memset(other + s.doubt[i].offset, 0, s.doubt[i].length);
    }
    ENSURE(memcmp(one, other, CAPACITY) == 0);
}

/* ---- a run --------------------------------------------------------------------------------- */

static void begin_run(const uint8_t *data, size_t size)
{
    const char *step;
    memset(&w, 0, sizeof w);
    w.c = (struct choices){data, size};
    if (!guest.base)
        guest = guest_make(MEMORY_BYTES);
    if (!record) {
        record_fd = memfd_create("record", MFD_CLOEXEC);
        ENSURE(record_fd >= 0 && ftruncate(record_fd, RECORD_BYTES) == 0);
        record = mmap(NULL, RECORD_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, record_fd, 0);
        ENSURE(record != MAP_FAILED);
    }
    guest.taken = 0;
    memset(guest.base, 0, 0x10000);
    memset(record, 0, RECORD_BYTES);
    struct vs_engine_config config = {.capacity_bytes = CAPACITY,
                                      .log_bytes = VS_REQUEST_BYTES_MAX,
                                      .destination_timeout_us = 30000,
                                      .stop_timeout_us = 10000,
                                      .max_lag_us = 20000,
                                      .block_bytes = choose(&w.c, 4) == 3 ? 4096 : 512,
                                      .queues_max = LANES,
                                      .checkpoint_us = 1000,
                                      .dirty_region_bytes = choose(&w.c, 2) ? 4096 : 65536,
                                      .copy_depth = 1 + choose(&w.c, 4),
                                      .threads = 1,
                                      .writeback = choose(&w.c, 4) != 3,
                                      .serial = "fuzz"};
    vs_disk *source = new_disk();
    if (choose(&w.c, 4) != 3) { /* with some content, and some holes */
        static uint8_t content[CAPACITY];
        for (uint64_t at = 0; at < CAPACITY; at += 4096)
            memset(content + at, at >> 16 & 1 ? (int)(1 + at / 4096 % 255) : 0, 4096);
        ENSURE(vs_test_disk_load(source, 0, CAPACITY, content) == 0);
    }
    ENSURE(vs_engine_create(&config, source, &w.engine, &step) == 0);
    for (unsigned i = 0; i < LANES; i++) {
        w.ring[i] = ring_make(&guest, 64);
        w.kick[i] = eventfd(0, EFD_NONBLOCK);
        w.call[i] = eventfd(0, EFD_NONBLOCK);
        w.driver[i] = driver_make(&guest, &w.c, BORDER - 0x8000, CAPACITY, i == 0);
        driver_use_ring(&w.driver[i], &w.ring[i]);
    }
    attach();
}

static void end(void)
{
    calm();
    look();
    calm(); /* what was submitted in between, to disks that held it */
    compare();
    if (choose(&w.c, 2)) {
        uint64_t token = simple(VS_CMD_DETACH, 0);
        simple(VS_CMD_RECORD_WRITTEN, 0);
        if (token)
            wait_for(token);
    }
    vs_engine_destroy(w.engine);
    for (unsigned i = 0; i < w.disks; i++)
        vs_test_disk_drop(w.disk[i]);
    for (unsigned i = 0; i < LANES; i++) {
        close(w.kick[i]);
        close(w.call[i]);
    }
}

static unsigned open_descriptors(void)
{
    unsigned count = 0;
    for (int fd = 0; fd < 512; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

/* (Run with -print_funcs=0: the symbolizer that prints them has pipes of its own.) */
static void show_descriptors(void)
{
    char path[64], target[256];
    for (int fd = 0; fd < 512; fd++) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(path, target, sizeof target - 1);
        if (n > 0)
            fprintf(stderr, "%d: %.*s\n", fd, (int)n, target);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static unsigned descriptors;
    begin_run(data, size);
    for (unsigned step = 0; w.c.left > 0 && step < 150; step++) {
        switch (choose(&w.c, 16)) {
        case 8:
        case 9:
            frontend();
            break;
        case 10:
        case 11:
        case 12:
            operate();
            break;
        case 13:
        case 14:
            disturb();
            break;
        case 15:
            look();
            if (rarely(&w.c)) /* time passes: deadlines, the bound on the lag */
                usleep(1000 * choose(&w.c, 40));
            break;
        default:
            drive();
        }
        while (next_event(0))
            ;
    }
    end();
    if (!descriptors)
        descriptors = open_descriptors();
    if (open_descriptors() != descriptors)
        show_descriptors();
    ENSURE(open_descriptors() == descriptors);
    return 0;
}
