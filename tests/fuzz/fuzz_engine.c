/* SPDX-License-Identifier: Apache-2.0
 *
 * The whole engine through shim_api.h: a mostly well-behaved driver and
 * frontend, commands in any order, disks that fail, hang and come back.
 *
 * Required: nothing crashes, every command that cannot wait is answered, the
 * counts keep their order, the engine ends. At the end the disks behave, and a
 * mirror that was lost is resumed: it must become steady, and when it is
 * drained, both disks hold the same, but for what is listed as in doubt or
 * unreadable; and a verification finds no more.
 */
#include "engine_frontend.h"
#include "engine_operator.h"

/* ---- the guest ----------------------------------------------------------------------- */

static bool has_room(unsigned lane)
{
    const struct packed_driver *r = &w.packed_ring[lane];
    unsigned taken = (r->avail & (WRAP - 1u)) + ((r->avail ^ r->used) & WRAP ? r->num : 0) - (r->used & (WRAP - 1u));
    return !w.packed || r->num - taken > DRIVER_SEGMENTS;
}

static void reap(unsigned lane)
{
    struct vring_used_elem e;
    unsigned id;
    uint32_t written;
    if (w.packed)
        while (packed_reap(&w.packed_ring[lane], &id, &written))
            ;
    else
        while (ring_reap(&w.ring[lane], &e))
            ;
}

static void drive(void)
{
    unsigned lane = choose(&w.c, LANES), burst = 1 + choose(&w.c, 6);
    uint64_t one = 1;
    while (burst--)
        if (has_room(lane))
            driver_put_request(&w.driver[lane]);
    driver_poke(&w.driver[lane]);
    if (w.packed)
        packed_publish(&w.packed_ring[lane]);
    else
        ring_publish(&w.ring[lane]);
    if (write(w.kick[lane], &one, sizeof one) < 0)
        ENSURE(errno == EAGAIN);
    reap(lane);
}

/* ---- the end of a run ------------------------------------------------------------------ */

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000ll + t.tv_nsec / 1000000;
}

/* Whatever waits for the operator or a disk goes on. */
static void unblock(void)
{
    calm();
    simple(VS_CMD_FAILOVER_GIVE_UP, 0);
    simple(VS_CMD_UNGATE, 0);
    simple(VS_CMD_MIRROR_SPEED, 0);
    simple(VS_CMD_BITMAP_VOID, 0);
    simple(VS_CMD_RECORD_WRITTEN, 0);
    if (w.state == VS_AHEAD)
        simple(VS_CMD_CATCH_UP, 0);
}

/* Resumes the mirror with the last destination, if the engine knows what that lacks, and it can be flushed. */
static void become_steady(void)
{
    int64_t ends = now_ms() + PATIENCE_MS;
    unsigned starts = 0;
    while (w.state != VS_STEADY) {
        ENSURE(now_ms() < ends);
        unblock();
        if (w.state == VS_PASSTHROUGH || w.state == VS_DEGRADED) {
            int rc = mirror_again(0);
            starts += rc == 0;
            if (rc == -EINVAL || w.destination < 0 || (starts > 2 && forgets_failed_flush(w.disk[w.destination])))
                return;
        }
        while (next_event(2))
            ;
    }
}

static void mask(uint8_t *one, uint8_t *other, const struct vs_range *range, uint32_t count)
{
    for (unsigned i = 0; i < count; i++) {
        memset(one + range[i].offset, 0, range[i].length);
        memset(other + range[i].offset, 0, range[i].length);
    }
}

/* Steady and drained: the same on both, unless a range is in doubt or unreadable. */
static void compare(void)
{
    static uint8_t one[DISK_BYTES], other[DISK_BYTES];
    struct vs_snapshot s;
    uint64_t token;
    unblock();
    token = simple(VS_CMD_GATE, 5000000);
    if (!token || wait_for(token).result < 0 || !look(&s))
        return;
    ENSURE(s.counts.writes_mirrored == s.counts.source_generation);
    ENSURE(vs_test_disk_read(w.disk[w.source], 0, w.capacity, 0, 0, one) == 0);
    ENSURE(vs_test_disk_read(w.disk[w.destination], 0, w.capacity, 0, 0, other) == 0);
    mask(one, other, s.unreadable, s.unreadable_count);
    mask(one, other, s.doubt, s.doubt_count);
    ENSURE(memcmp(one, other, w.capacity) == 0);
}

static void verify_all(void)
{
    struct vs_snapshot s;
    int64_t ends = now_ms() + PATIENCE_MS;
    command(VS_CMD_UNGATE, 0);
    command(VS_CMD_VERIFY_STOP, 0);
    while (look(&s) && s.verify_running)
        ENSURE(now_ms() < ends);
    if (s.mirror_state != VS_STEADY || w.spoilt || s.unreadable_count || s.doubt_count)
        return;
    if (command(VS_CMD_VERIFY, 0) < 0)
        return;
    while (look(&s) && s.verify_running)
        ENSURE(now_ms() < ends);
    ENSURE(s.verify_bytes_differing == 0);
}

static void end(void)
{
    struct vs_snapshot s;
    calm();
    look(&s);
    calm(); /* what was submitted in between, to disks that held it */
    if (choose(&w.c, 4) != 3)
        become_steady();
    compare();
    if (choose(&w.c, 2))
        verify_all();
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
    if (w.bitmap_fd >= 0)
        close(w.bitmap_fd);
}

/* ---- its beginning ------------------------------------------------------------------------ */

static void load(vs_disk *disk) /* with some content, and some holes */
{
    static uint8_t content[CAPACITY];
    for (uint64_t at = 0; at < CAPACITY; at += 4096)
        memset(content + at, at >> 16 & 1 ? (int)(1 + at / 4096 % 255) : 0, 4096);
    ENSURE(vs_test_disk_load(disk, 0, CAPACITY, content) == 0);
}

/* A dirty bitmap with a peer that is known and differs everywhere: the next disk. */
static void with_bitmap(struct vs_engine_config *config)
{
    struct vs_bitmap_shape shape = {.capacity_bytes = CAPACITY,
                                    .extent_bytes = 1u << 17,
                                    .region_bytes = config->dirty_region_bytes,
                                    .extents = 4100};
    struct vs_bitmap_shape grown = shape;
    grown.capacity_bytes = DISK_BYTES; /* the control plane makes the file long enough before it grows the disk */
    w.bitmap_bytes = vs_bitmap_file_bytes(&grown);
    w.bitmap_fd = memfd_create("bitmap", MFD_CLOEXEC);
    ENSURE(w.bitmap_bytes && w.bitmap_fd >= 0 && ftruncate(w.bitmap_fd, (off_t)w.bitmap_bytes) == 0);
    ENSURE(vs_bitmap_open(dup(w.bitmap_fd), &shape, VS_BITMAP_FRESH, &config->bitmap) == 0);
    config->peer_tracked = choose(&w.c, 2);
    if (config->peer_tracked) {
        w.destination = (int)w.disks;
        vs_test_disk_drop(new_disk()); /* an earlier engine had it */
    }
}

static struct vs_engine_config some_config(void)
{
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
                                      .threads = 1 + (choose(&w.c, 4) == 3),
                                      .writeback = choose(&w.c, 4) != 3,
                                      .read_only = choose(&w.c, 32) == 31,
                                      .poll_us = choose(&w.c, 4) == 3 ? 50 : 0,
                                      .pull_ahead = choose(&w.c, 4) == 3,
                                      .congestion_fill_bytes = 4096u << choose(&w.c, 5),
                                      .ahead_backoff_us = 500,
                                      .read_fallback = choose(&w.c, 4) == 3,
                                      .switch_on_source_error = choose(&w.c, 4) == 3,
                                      .pause_on_destination_error = choose(&w.c, 4) == 3,
                                      .doubt_count = choose(&w.c, 8) == 7,
                                      .doubt[0] = {.offset = 0x3000, .length = 0x2000},
                                      .serial = "fuzz"};
    config.spared_count = config.doubt_count && choose(&w.c, 2);
    config.spared[0] = config.doubt[0];
    return config;
}

static void begin_run(const uint8_t *data, size_t size)
{
    const char *step;
    memset(&w, 0, sizeof w);
    w.c = (struct choices){data, size};
    w.capacity = CAPACITY;
    w.destination = w.bitmap_fd = -1;
    w.attentive = choose(&w.c, 4) != 3;
    if (!guest.base) {
        guest = guest_make(MEMORY_BYTES);
        record = share("record", RECORD_BYTES);
        dirty_log = share("log", DIRTY_LOG_BYTES);
    }
    memset(record.base, 0, record.bytes);
    memset(guest.base, 0, 0x10000);
    struct vs_engine_config config = some_config();
    vs_disk *source = new_disk();
    if (choose(&w.c, 4) != 3)
        load(source);
    if (choose(&w.c, 4) == 3)
        with_bitmap(&config);
    ENSURE(vs_engine_create(&config, source, &w.engine, &step) == 0);
    for (unsigned i = 0; i < LANES; i++) {
        w.kick[i] = eventfd(0, EFD_NONBLOCK);
        w.call[i] = eventfd(0, EFD_NONBLOCK);
        w.driver[i] = driver_make(&guest, &w.c, BORDER - 0x8000, CAPACITY, i == 0);
    }
    rings_anew(false);
    attach();
}

/* ---- a run ----------------------------------------------------------------------------------- */

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

static void look_around(void)
{
    struct vs_snapshot s;
    look(&s);
    if (rarely(&w.c)) /* time passes: deadlines, the bound on the lag */
        usleep(1000 * choose(&w.c, 40));
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
            look_around();
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
