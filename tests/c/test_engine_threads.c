/* SPDX-License-Identifier: Apache-2.0
 *
 * Load: every queue has a driver's thread of its own, the control plane has
 * one, a third only looks. What the sanitizers are to see is here; what is
 * checked: every driver reads what it wrote, both disks are the same when they
 * must be, and the counts keep their order at every look.
 *
 * Guest memory is mapped twice, by the drivers and by the engine, so the thread
 * sanitizer does not follow the rings; it sees all that the threads share else.
 */
#include <fcntl.h>
#include <pthread.h>
#include <sys/resource.h>

#include "held.h"
#include "rig.h"

#define OWN_SECTORS 1024ull   /* a driver's own range */
#define SHARED_SECTORS 512ull /* where all of them write */

static atomic_bool stop_drivers, stop_watcher;

struct driver {
    pthread_t thread;
    struct lane *lane;
    unsigned number;
    uint64_t requests;        /* how many to send; 0: until told to stop */
    uint8_t own[OWN_SECTORS]; /* what was written there last; one value a sector */
    uint64_t flushes, errors;
};

/* A slot's request in flight, for the check when it completes. */
struct sent {
    uint32_t type;
    uint64_t sector; /* relative to the driver's own range */
    uint32_t sectors;
    bool shared;
};

static void check_read(struct driver *d, unsigned slot, const struct sent *s)
{
    for (uint32_t i = 0; i < s->sectors; i++) {
        const uint8_t *p = lane_data(d->lane, slot) + 512 * i;
        CHECK(p[0] == d->own[s->sector + i] && memcmp(p, p + 1, 511) == 0);
    }
}

static bool overlaps(const struct sent *all, const bool *busy, const struct sent *next)
{
    for (unsigned i = 0; i < LANE_DEPTH; i++)
        if (busy[i] && !all[i].shared && all[i].sector < next->sector + next->sectors &&
            next->sector < all[i].sector + all[i].sectors)
            return true;
    return false;
}

/* In its own range a driver has no two requests on the same sector at once, so it knows what it must read. */
static bool choose_request(struct driver *d, const struct sent *all, const bool *busy, struct sent *s)
{
    static const uint32_t types[] = {VIRTIO_BLK_T_OUT,     VIRTIO_BLK_T_OUT,  VIRTIO_BLK_T_OUT,
                                     VIRTIO_BLK_T_IN,      VIRTIO_BLK_T_OUT,  VIRTIO_BLK_T_WRITE_ZEROES,
                                     VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH};
    uint64_t *seed = &d->lane->seed;
    s->type = types[test_random(seed) % 8];
    s->sectors = 1 + (uint32_t)(test_random(seed) % (test_random(seed) % 16 ? 8 : 128));
    s->shared = test_random(seed) % 4 == 0;
    if (s->type == VIRTIO_BLK_T_FLUSH) {
        s->shared = true;
        s->sectors = 0;
        s->sector = 0;
        return test_random(seed) % 4 == 0;
    }
    s->sector = test_random(seed) % ((s->shared ? SHARED_SECTORS : OWN_SECTORS) - s->sectors);
    return s->shared || !overlaps(all, busy, s);
}

static void send_request(struct driver *d, unsigned slot, const struct sent *s)
{
    uint64_t sector = s->sector + (s->shared ? 0 : SHARED_SECTORS + d->number * OWN_SECTORS);
    uint8_t value = (uint8_t)test_random(&d->lane->seed);
    struct virtio_blk_discard_write_zeroes range = {.sector = sector, .num_sectors = s->sectors};
    uint32_t bytes = 512 * s->sectors;
    switch (s->type) {
    case VIRTIO_BLK_T_WRITE_ZEROES:
    case VIRTIO_BLK_T_DISCARD:
        memcpy(lane_data(d->lane, slot), &range, sizeof range);
        bytes = sizeof range;
        value = 0;
        break;
    case VIRTIO_BLK_T_OUT:
        memset(lane_data(d->lane, slot), value, bytes);
        break;
    default:
        break;
    }
    if (!s->shared && s->type != VIRTIO_BLK_T_IN)
        memset(d->own + s->sector, value, s->sectors);
    lane_send(d->lane, slot, s->type, sector, bytes);
}

static void *drive(void *arg)
{
    struct driver *d = arg;
    struct sent sent[LANE_DEPTH];
    bool busy[LANE_DEPTH] = {false};
    for (uint64_t n = 0; d->requests ? n < d->requests : !atomic_load(&stop_drivers); n++) {
        unsigned slot = (unsigned)(test_random(&d->lane->seed) % LANE_DEPTH);
        struct sent s;
        if (!busy[slot] && choose_request(d, sent, busy, &s)) {
            sent[slot] = s;
            busy[slot] = true;
            send_request(d, slot, &s);
        }
        /* Sometimes a pause, so that the engine sleeps and has to be woken. */
        bool pause = test_random(&d->lane->seed) % 64 == 0;
        while (d->lane->in_flight && (pause || d->lane->in_flight > LANE_DEPTH / 2)) {
            int done = lane_wait(d->lane);
            busy[done] = false;
            if (lane_status(d->lane, (unsigned)done) != VIRTIO_BLK_S_OK)
                d->errors++;
            else if (sent[done].type == VIRTIO_BLK_T_IN && !sent[done].shared)
                check_read(d, (unsigned)done, &sent[done]);
            d->flushes += sent[done].type == VIRTIO_BLK_T_FLUSH;
        }
    }
    while (d->lane->in_flight)
        if (lane_status(d->lane, (unsigned)lane_wait(d->lane)) != VIRTIO_BLK_S_OK)
            d->errors++;
    return NULL;
}

/* Looks at what the engine shows, at any time. */
static void *watch(void *arg)
{
    struct rig *r = arg;
    while (!atomic_load(&stop_watcher)) {
        struct vs_snapshot s;
        struct vs_queue_stats q;
        vs_engine_snapshot(r->engine, &s);
        vs_engine_queue_stats(r->engine, 1, &q);
        CHECK(s.counts.source_flushed <= s.counts.source_generation);
        CHECK(s.counts.flush_request <= s.counts.source_generation);
        if (s.counts.mirrored_known) {
            CHECK(s.counts.writes_flushed <= s.counts.writes_mirrored);
            CHECK(s.counts.writes_mirrored <= s.counts.source_generation);
        }
        usleep(200);
    }
    return NULL;
}

static struct driver driver[LANES];

static void drivers_start(struct rig *r, uint64_t requests)
{
    atomic_store(&stop_drivers, false);
    for (unsigned i = 0; i < LANES; i++) {
        driver[i].lane = &r->lane[i];
        driver[i].number = i;
        driver[i].requests = requests;
        CHECK_EQUAL(pthread_create(&driver[i].thread, NULL, drive, &driver[i]), 0);
    }
}

static void drivers_end(unsigned long allowed_errors)
{
    atomic_store(&stop_drivers, true);
    for (unsigned i = 0; i < LANES; i++) {
        pthread_join(driver[i].thread, NULL);
        CHECK(driver[i].errors <= allowed_errors);
    }
}

static struct rig begin_rig(uint64_t features)
{
    memset(driver, 0, sizeof driver);
    return rig_begin(LANES, features);
}

/* Looks while it waits for so many writes. */
static void wait_for_writes(struct rig *r, uint64_t count)
{
    uint64_t from = rig_snapshot(r).counts.source_generation;
    while (rig_snapshot(r).counts.source_generation < from + count)
        usleep(100);
}

static void passthrough(void)
{
    struct rig r = begin_rig(F_USUAL);
    drivers_start(&r, 20000);
    drivers_end(0);
    rig_end(&r);
    r = begin_rig(F_USUAL | F_EVENT_IDX | F_INDIRECT);
    drivers_start(&r, 20000);
    drivers_end(0);
    rig_end(&r);
}

/* From nothing to steady and away again, the drivers running all the time. */
static void a_whole_life(void)
{
    struct rig r = begin_rig(F_USUAL | F_EVENT_IDX | F_INDIRECT);
    pthread_t watcher;
    atomic_store(&stop_watcher, false);
    CHECK_EQUAL(pthread_create(&watcher, NULL, watch, &r), 0);
    drivers_start(&r, 0);
    for (unsigned round = 0; round < 32; round++) {
        bool keep = round % 4 != 3;
        if (r.state != VS_STEADY) {
            wait_for_writes(&r, 200);
            rig_mirror(&r);
        }
        wait_for_writes(&r, 500);
        CHECK_EQUAL(rig_simple(&r, VS_CMD_MIRROR_DRAIN, 1), 0);
        wait_for_writes(&r, 100);
        CHECK_EQUAL(rig_simple(&r, VS_CMD_GATE, UNHURRIED_US), 0);
        struct vs_snapshot s = rig_snapshot(&r);
        CHECK(s.gated);
        CHECK_EQUAL(s.counts.writes_mirrored, s.counts.source_generation);
        CHECK(disks_equal(r.source, r.destination, CUT_NONE));
        CHECK_EQUAL(rig_exchange(&r, keep), 0);
        vs_disk *old = r.source;
        r.source = r.destination;
        r.destination = old;
        if (!keep) {
            rig_wait_state(&r, VS_PASSTHROUGH);
            vs_test_disk_drop(old);
            r.destination = NULL;
        }
    }
    wait_for_writes(&r, 200);
    rig_mirror(&r);
    wait_for_writes(&r, 200);
    drivers_end(0);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_MIRROR_DRAIN, 1), 0);
    CHECK(disks_equal(r.source, r.destination, CUT_ALL));
    atomic_store(&stop_watcher, true);
    pthread_join(watcher, NULL);
    for (unsigned i = 0; i < LANES; i++)
        CHECK(driver[i].flushes > 0);
    rig_end(&r);
}

/* Destinations that fail and hang under load never touch the guest. */
static void failing_destinations(void)
{
    struct vs_engine_config config = rig_config();
    config.destination_timeout_us = 250000; /* 50 ms are missed by a good destination where the machine is loaded */
    memset(driver, 0, sizeof driver);
    struct rig r = rig_make(&config, rig_test_disk());
    rig_attach(&r, LANES, F_USUAL | F_EVENT_IDX);
    drivers_start(&r, 0);
    for (unsigned round = 0; round < 12; round++) {
        unsigned degraded = r.seen[VS_EV_DEGRADED], fences = r.seen[VS_EV_FENCE_CLEAR];
        uint32_t op = round % 2 ? VS_DISK_WRITE : VS_DISK_FLUSH;
        rig_mirror(&r);
        wait_for_writes(&r, 100);
        if (round < 8)
            vs_test_disk_fault(r.destination, op, EIO, (int)round, -1);
        else
            vs_test_disk_hold(r.destination, op, 1);
        rig_wait_seen(&r, VS_EV_DEGRADED, degraded + 1);
        CHECK_EQUAL(rig_simple(&r, VS_CMD_RECORD_WRITTEN, 0), 0);
        wait_for_writes(&r, 100);
        vs_test_disk_hold(r.destination, op, 0);
        while (r.seen[VS_EV_FENCE_CLEAR] == fences) {
            vs_test_disk_release(r.destination, op, 1000);
            rig_snapshot(&r);
        }
        vs_test_disk_drop(r.destination);
        r.destination = NULL;
    }
    drivers_end(0);
    rig_end(&r);
}

static unsigned open_descriptors(void)
{
    unsigned count = 0;
    for (int fd = 0; fd < 1024; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

/* Rings are stopped, resumed, disabled and enabled under load. */
static void stop_and_go(void)
{
    struct rig r = begin_rig(F_USUAL | F_EVENT_IDX);
    rig_mirror(&r);
    unsigned before = open_descriptors();
    drivers_start(&r, 0);
    for (unsigned round = 0; round < 200; round++) {
        unsigned i = round % LANES;
        if (round % 3) {
            CHECK_EQUAL(rig_vring(&r, VS_CMD_VRING_ENABLE, i, 0, -1), 0);
            CHECK_EQUAL(rig_vring(&r, VS_CMD_VRING_ENABLE, i, 1, -1), 0);
        } else {
            struct vs_event done =
                rig_wait(&r, rig_submit(&r, &(struct vs_command){.kind = VS_CMD_VRING_STOP, .queue = i, .fd = -1}));
            CHECK_EQUAL(done.result, 0);
            CHECK_EQUAL(rig_vring(&r, VS_CMD_VRING_BASE, i, done.value, -1), 0);
            CHECK_EQUAL(rig_vring(&r, VS_CMD_VRING_KICK, i, 0, dup(r.lane[i].kick_fd)), 0);
        }
        wait_for_writes(&r, 20);
    }
    drivers_end(0);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_MIRROR_DRAIN, 1), 0);
    CHECK(disks_equal(r.source, r.destination, CUT_ALL));
    /* The kick descriptors of former starts were given back. */
    for (unsigned tries = 0; open_descriptors() > before && tries < 1000; tries++)
        rig_snapshot(&r);
    CHECK_EQUAL(open_descriptors(), before);
    rig_end(&r);
}

/* The log as small as it may be, a slow destination: writes wait for room, and all of them end. */
static void a_slow_destination(void)
{
    struct rig r = begin_rig(F_USUAL);
    rig_mirror(&r);
    vs_test_disk_hold(r.destination, VS_DISK_WRITE, 1);
    drivers_start(&r, 2000);
    for (unsigned idle = 0; idle < 300;) {
        bool moved = vs_test_disk_release(r.destination, VS_DISK_WRITE, 2) > 0;
        idle = moved ? 0 : idle + 1;
        usleep(moved ? 100 : 1000);
    }
    vs_test_disk_hold(r.destination, VS_DISK_WRITE, 0);
    vs_test_disk_release(r.destination, VS_DISK_WRITE, 1000);
    drivers_end(0);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_MIRROR_DRAIN, 1), 0);
    CHECK(disks_equal(r.source, r.destination, CUT_ALL));
    rig_end(&r);
}

/* ---- files ------------------------------------------------------------------- */

static vs_disk *file_disk(int fd, int direct)
{
    struct vs_disk_probe probe;
    CHECK_EQUAL(ftruncate(fd, DISK_BYTES), 0);
    CHECK_EQUAL(vs_disk_probe_fd(fd, direct, &probe), 0);
    vs_disk *disk = vs_disk_file(dup(fd), &probe, direct);
    CHECK(disk);
    return disk;
}

static void on_files(const int fd[2], int direct, uint32_t poll_us, uint32_t threads)
{
    static _Alignas(4096) uint8_t one[DISK_BYTES], other[DISK_BYTES]; /* as direct I/O wants them */
    struct vs_engine_config config = rig_config();
    config.block_bytes = 512;
    config.poll_us = poll_us;
    config.threads = threads;
    memset(driver, 0, sizeof driver);
    struct rig r = rig_make(&config, file_disk(fd[0], direct));
    rig_attach(&r, LANES, F_USUAL | F_EVENT_IDX);
    drivers_start(&r, 0);
    wait_for_writes(&r, 500);
    CHECK_EQUAL(rig_mirror_start(&r, file_disk(fd[1], direct)), 0);
    rig_wait_state(&r, VS_STEADY);
    wait_for_writes(&r, 500);
    for (unsigned round = 0; round < 4; round++) {
        CHECK_EQUAL(rig_simple(&r, VS_CMD_MIRROR_DRAIN, 1), 0);
        CHECK_EQUAL(rig_simple(&r, VS_CMD_GATE, UNHURRIED_US), 0);
        CHECK_EQUAL(pread(fd[0], one, DISK_BYTES, 0), DISK_BYTES);
        CHECK_EQUAL(pread(fd[1], other, DISK_BYTES, 0), DISK_BYTES);
        CHECK(memcmp(one, other, DISK_BYTES) == 0);
        CHECK_EQUAL(rig_exchange(&r, 1), 0);
        wait_for_writes(&r, 200);
    }
    drivers_end(0);
    rig_detach(&r);
    vs_engine_destroy(r.engine);
    close(fd[0]);
    close(fd[1]);
}

static void files_in_memory(void)
{
    on_files((int[]){memfd_create("a", MFD_CLOEXEC), memfd_create("b", MFD_CLOEXEC)}, 0, 0, 1);
}

static void several_threads_in_memory(void)
{
    on_files((int[]){memfd_create("a", MFD_CLOEXEC), memfd_create("b", MFD_CLOEXEC)}, 0, 0, 3);
}

/* The rings are looked at without kicks; where that ends, no request may be forgotten. */
static void looking_before_sleeping(void)
{
    static const uint32_t poll_us[] = {1, 50, VS_POLL_AUTO};
    for (unsigned i = 0; i < sizeof poll_us / sizeof poll_us[0]; i++)
        on_files((int[]){memfd_create("a", MFD_CLOEXEC), memfd_create("b", MFD_CLOEXEC)}, 0, poll_us[i], 1 + i);
}

static void files_on_disk(void)
{
    for (unsigned i = 0; i < 4; i++) {
        int direct = i & 1;
        int flags = O_TMPFILE | O_RDWR | O_CLOEXEC | (direct ? O_DIRECT : 0);
        int fd[2] = {open(".", flags, 0600), open(".", flags, 0600)};
        if (fd[0] < 0 || fd[1] < 0)
            printf("# no such files in this directory: %s\n", strerror(errno));
        else
            on_files(fd, direct, 0, i < 2 ? 1 : 2);
    }
}

/* Engines with threads of their own, each with a guest and, every other one, a mirror. */
static void begun_and_ended(void)
{
    struct held before = {0};
    for (int n = -5; n < leak_cycles(); n++) {
        if (n == 0)
            before = held_now(); /* what is kept and used again, the first ones have made */
        struct vs_engine_config config = rig_config();
        config.threads = 3;
        int fd[2] = {memfd_create("a", MFD_CLOEXEC), memfd_create("b", MFD_CLOEXEC)};
        struct rig r = rig_make(&config, file_disk(fd[0], 0));
        rig_attach(&r, LANES, F_USUAL);
        if (n % 2) {
            CHECK_EQUAL(rig_mirror_start(&r, file_disk(fd[1], 0)), 0);
            rig_wait_state(&r, VS_STEADY);
        }
        for (unsigned i = 0; i < LANES; i++) /* more than one at the disk: so some are lent */
            for (unsigned slot = 0; slot < 4; slot++)
                lane_send(&r.lane[i], slot, VIRTIO_BLK_T_OUT, 8 * (4 * i + slot), 4096);
        for (unsigned i = 0; i < LANES; i++)
            lane_quiet(&r.lane[i]);
        rig_detach(&r);
        vs_engine_destroy(r.engine);
        close(fd[0]);
        close(fd[1]);
    }
    held_check(&before);
}

/* A descriptor is lacking, each one that the start takes: nothing of it is left, and the source is still the
 * caller's. */
static void begun_in_part(void)
{
    struct vs_engine_config config = rig_config();
    struct rlimit old, limit;
    unsigned failed = 0;
    vs_engine *engine;
    const char *step;
    int rc;
    config.threads = 3;
    int fd = memfd_create("a", MFD_CLOEXEC), lowest_fd;
    vs_disk *source = file_disk(fd, 0);
    close(fd);
    lowest_fd = dup(0);
    CHECK(lowest_fd >= 0);
    close(lowest_fd);
    CHECK_EQUAL(getrlimit(RLIMIT_NOFILE, &old), 0);
    struct held before = held_now();
    for (;; failed++) {
        step = "";
        limit = old;
        limit.rlim_cur = (rlim_t)lowest_fd + failed;
        CHECK_EQUAL(setrlimit(RLIMIT_NOFILE, &limit), 0);
        rc = vs_engine_create(&config, source, &engine, &step);
        CHECK_EQUAL(setrlimit(RLIMIT_NOFILE, &old), 0);
        if (rc == 0)
            break;
        CHECK_EQUAL(rc, -EMFILE);
        CHECK(step[0] && failed < 32);
        held_check(&before);
    }
    CHECK(failed >= 7); /* the mailbox's, three rings, a descriptor each to wake the two */
    vs_engine_destroy(engine);
}

int main(void)
{
    test("pass-through", passthrough);
    test("a whole life", a_whole_life);
    test("failing destinations", failing_destinations);
    test("stop and go", stop_and_go);
    test("a slow destination", a_slow_destination);
    test("files in memory", files_in_memory);
    test("files in memory, three threads", several_threads_in_memory);
    test("files on disk", files_on_disk);
    test("looking before sleeping", looking_before_sleeping);
    test("begun and ended", begun_and_ended);
    test("begun in part", begun_in_part);
    return tests_end();
}
