/* SPDX-License-Identifier: Apache-2.0
 *
 * Pushes requests through a whole engine and tells what that took: guard-push WORK BATCHES
 *
 * A driver on its own thread puts BATCH requests of 4 KiB into the ring, notifies once, asks to be told of the last
 * completion alone, and waits for it: so batches are the same in every run, whatever the machine does meanwhile.
 * Disks are memory. The figures are those of the whole process, from start to end: who runs it with two numbers of
 * batches and subtracts (measure.py) has what a batch takes, free of what a start takes.
 */
#define LANE_DEPTH 32
#include "rig.h"

#include <dirent.h>
#include <fcntl.h>

#include "disk.h"

enum { BATCH = 32, BLOCK_BYTES = 4096, DISK_BLOCKS = DISK_BYTES / BLOCK_BYTES };

struct work {
    const char *name;
    uint32_t type;
    bool mirrored;
    bool flush;   /* the last of a batch is a flush */
    bool inlined; /* plain calls, as for tmpfs; otherwise io_uring, as for a disk */
    bool lent;    /* to an I/O thread, all but the first of a batch */
};

static const struct work works[] = {
    {"read", VIRTIO_BLK_T_IN, false, false, true, false},
    {"write", VIRTIO_BLK_T_OUT, false, false, true, false},
    {"read-uring", VIRTIO_BLK_T_IN, false, false, false, false},
    {"write-uring", VIRTIO_BLK_T_OUT, false, false, false, false},
    {"write-mirrored", VIRTIO_BLK_T_OUT, true, false, true, false},
    {"write-mirrored-flush", VIRTIO_BLK_T_OUT, true, true, true, false},
    {"read-lent", VIRTIO_BLK_T_IN, false, false, true, true},
    {"write-mirrored-lent", VIRTIO_BLK_T_OUT, true, false, true, true},
};

/* ---- malloc, counted ------------------------------------------------------------ */

static atomic_ulong allocations;

void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t count, size_t bytes);
void *__libc_realloc(void *old, size_t bytes);
void *__libc_memalign(size_t alignment, size_t bytes);

void *malloc(size_t bytes)
{
    atomic_fetch_add(&allocations, 1);
    return __libc_malloc(bytes);
}

void *calloc(size_t count, size_t bytes)
{
    atomic_fetch_add(&allocations, 1);
    return __libc_calloc(count, bytes);
}

void *realloc(void *old, size_t bytes)
{
    atomic_fetch_add(&allocations, 1);
    return __libc_realloc(old, bytes);
}

void *aligned_alloc(size_t alignment, size_t bytes)
{
    atomic_fetch_add(&allocations, 1);
    return __libc_memalign(alignment, bytes);
}

int posix_memalign(void **out, size_t alignment, size_t bytes)
{
    *out = aligned_alloc(alignment, bytes);
    return *out ? 0 : ENOMEM;
}

/* ---- the engine and its guest ------------------------------------------------------ */

static void (*file_submit)(vs_disk *disk, struct disk_io *io);

static void submit_without_holes(vs_disk *disk, struct disk_io *io)
{
    if (io->kind != VS_DISK_EXTENTS) {
        file_submit(disk, io);
        return;
    }
    disk_all_data(io);
    disk_complete(io, 0);
}

static vs_disk *disk_on(int fd, const struct vs_disk_probe *probe)
{
    vs_disk *disk = vs_disk_file(fd, probe, 0);
    CHECK(disk);
    /* /dev/zero answers a question for holes with nonsense. */
    static struct disk_ops ops;
    ops = *disk->ops;
    file_submit = disk->ops->submit;
    ops.submit = submit_without_holes;
    disk->ops = &ops;
    return disk;
}

static vs_disk *memory_disk(const struct work *work)
{
    struct vs_disk_probe probe = {DISK_BYTES, 0, 512, 512, 512, 0, 0, 0};
    /* The kernel's worker threads do what might wait, as writes to a cached file: how many wake-ups that takes is luck.
     * Requests to this device never wait. */
    int fd = work->inlined ? memfd_create("disk", MFD_CLOEXEC) : open("/dev/zero", O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0);
    if (!work->inlined)
        return disk_on(fd, &probe);
    /* Written, so that no request has to have a page made for it. */
    static uint8_t content[DISK_BYTES];
    memset(content, 0x5a, sizeof content);
    CHECK_EQUAL(write(fd, content, sizeof content), (ssize_t)sizeof content);
    CHECK_EQUAL(vs_disk_probe_fd(fd, 0, &probe), 0);
    CHECK(probe.inline_io);
    return disk_on(fd, &probe);
}

static void begin_rig(struct rig *r, const struct work *work)
{
    struct vs_engine_config config = rig_config();
    config.log_bytes = 64u << 20;
    /* Nothing that comes with time may mix with what comes with requests. */
    config.checkpoint_us = 3600000000u;
    config.threads = work->lent ? 2 : 1;
    *r = rig_make(&config, memory_disk(work));
    rig_attach(r, config.threads, F_USUAL | F_INDIRECT | F_EVENT_IDX); /* the last queue is the last thread's */
    if (!work->mirrored)
        return;
    CHECK_EQUAL(rig_mirror_start(r, memory_disk(work)), 0);
    rig_wait_state(r, VS_STEADY);
}

static void end(struct rig *r)
{
    rig_detach(r);
    vs_engine_destroy(r->engine);
}

/* Asks for one notification, when all of the batch is done. */
static void wait_for_batch(struct lane *l)
{
    struct pollfd p = {.fd = l->call_fd, .events = POLLIN};
    uint64_t counter;
    while (l->in_flight) {
        while (lane_poll(l) >= 0)
            ;
        if (!l->in_flight)
            return;
        __atomic_store_n(ring_used_event(&l->ring), (uint16_t)(l->ring.reaped + l->in_flight - 1), __ATOMIC_RELAXED);
        atomic_thread_fence(memory_order_seq_cst);
        if (__atomic_load_n(&l->ring.used->idx, __ATOMIC_ACQUIRE) == (uint16_t)(l->ring.reaped + l->in_flight))
            continue;
        if (poll(&p, 1, PATIENCE_MS) == 0)
            test_failed(__FILE__, __LINE__, "a batch completes and its driver is notified");
        if (read(l->call_fd, &counter, sizeof counter) < 0)
            CHECK(errno == EAGAIN);
    }
}

static void push(struct lane *l, const struct work *work, unsigned batches)
{
    uint64_t state = 7;
    for (unsigned batch = 0; batch < batches; batch++) {
        uint16_t old = l->ring.published;
        /* Before anything is published: else the first completion finds what the last batch asked for. */
        __atomic_store_n(ring_used_event(&l->ring), (uint16_t)(l->ring.reaped + BATCH - 1), __ATOMIC_RELAXED);
        for (unsigned slot = 0; slot < BATCH; slot++) {
            bool flush = work->flush && slot == BATCH - 1;
            uint64_t block = test_random(&state) % DISK_BLOCKS;
            lane_put(l, slot, flush ? VIRTIO_BLK_T_FLUSH : work->type, flush ? 0 : block * (BLOCK_BYTES / 512),
                     flush ? 0 : BLOCK_BYTES);
        }
        lane_publish(l, old);
        wait_for_batch(l);
    }
    CHECK_EQUAL(l->errors, 0);
}

/* The engine's thread, for who traces this process: there is one other than ours. */
static int engine_thread(void)
{
    DIR *tasks = opendir("/proc/self/task");
    CHECK(tasks);
    int found = 0;
    for (struct dirent *entry; (entry = readdir(tasks));) {
        int id = atoi(entry->d_name);
        char path[64], name[32] = "";
        snprintf(path, sizeof path, "/proc/self/task/%d/comm", id);
        FILE *file = id ? fopen(path, "r") : NULL;
        if (file && fgets(name, sizeof name, file) && !strncmp(name, "vhostsync-data", 14))
            found = id;
        if (file)
            fclose(file);
    }
    closedir(tasks);
    return found;
}

int main(int argc, char **argv)
{
    const struct work *work = NULL;
    for (size_t i = 0; argc == 3 && i < sizeof works / sizeof works[0]; i++)
        if (!strcmp(works[i].name, argv[1]))
            work = &works[i];
    if (!work) {
        fputs("usage: guard-push WORK BATCHES\n", stderr);
        return 2;
    }
    struct rig r;
    struct vs_queue_stats queue;
    begin_rig(&r, work);
    int thread = engine_thread();
    struct lane *lane = &r.lane[r.lanes - 1];
    push(lane, work, (unsigned)atoi(argv[2]));
    struct vs_snapshot snapshot = rig_snapshot(&r);
    vs_engine_queue_stats(r.engine, r.lanes - 1, &queue);
    unsigned long made = atomic_load(&allocations);
    printf("{\"requests\": %" PRIu64 ", \"wakeups\": %" PRIu64 ", \"syscalls\": %" PRIu64 ", \"kicks\": %" PRIu64
           ", \"notifications\": %" PRIu64 ", \"allocations\": %lu, \"engine_thread\": %d}\n",
           lane->done, snapshot.wakeups, snapshot.syscalls, queue.kicks, queue.notifications, made, thread);
    end(&r);
    return 0;
}
