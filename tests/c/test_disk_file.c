/* SPDX-License-Identifier: Apache-2.0
 *
 * Files as disks, through io_uring and by plain calls, on a thread that plays
 * the engine's part, and on I/O threads. The files lie in the working directory (for direct I/O
 * and holes) and in memory.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "disk.h"
#include "harness.h"

#define BYTES (4u << 20)
#define IOS 64

static struct uring uring;
static struct disk_host host;
static struct uring_op woken; /* by I/O threads */
static unsigned thread;       /* does the work; 0: this one */
static uint8_t *buffer;       /* BYTES, aligned */
static uint8_t mirror[BYTES];

struct call {
    struct disk_io io; /* first: the two share an address */
    struct iovec iov[8];
    int done;
};

static void on_done(struct disk_io *io)
{
    ((struct call *)io)->done++;
}

static void start(vs_disk *disk, struct call *c, uint32_t kind, uint64_t offset, uint64_t length, void *memory)
{
    c->done = 0;
    c->iov[0] = (struct iovec){memory, length};
    c->io.kind = kind;
    c->io.offset = offset;
    c->io.length = length;
    c->io.iov = c->iov;
    c->io.iov_count = 1;
    c->io.thread = thread;
    c->io.done = on_done;
    disk_submit(disk, &c->io);
    CHECK_EQUAL(c->done, 0); /* never from within */
}

static void on_wake(struct uring_op *op, int result, unsigned flags)
{
    (void)op;
    CHECK(result > 0 && flags & IORING_CQE_F_MORE);
}

static void turn(void)
{
    io_threads_wake(&host.threads);
    uring_enter(&uring, list_empty(&host.done) && io_threads_may_sleep(&host.threads) ? UINT64_MAX : 0);
    io_threads_awake(&host.threads);
    uring_reap(&uring);
    io_threads_take_back(&host.threads);
    disk_run_done(&host);
}

static int finish_call(struct call *c)
{
    while (!c->done)
        turn();
    CHECK_EQUAL(c->done, 1);
    return c->io.result;
}

static int call(vs_disk *disk, uint32_t kind, uint64_t offset, uint64_t length, void *memory)
{
    struct call c = {.io.may_unmap = false};
    start(disk, &c, kind, offset, length, memory);
    return finish_call(&c);
}

static uint64_t data_at(vs_disk *disk, uint64_t offset, uint64_t length)
{
    static struct call c;
    unsigned usual = thread;
    thread = 0;
    c.io.to_data_end = true;
    start(disk, &c, VS_DISK_EXTENTS, offset, length, NULL);
    thread = usual;
    CHECK_EQUAL(finish_call(&c), 0);
    CHECK(c.io.data_at >= offset && c.io.data_end >= c.io.data_at && c.io.data_end <= offset + length);
    return c.io.data_at;
}

static int zero(vs_disk *disk, uint64_t offset, uint64_t length, bool may_unmap)
{
    struct call c = {.io.may_unmap = may_unmap};
    start(disk, &c, VS_DISK_ZERO, offset, length, NULL);
    return finish_call(&c);
}

struct kind_of_file {
    const char *name;
    bool direct, memory;
};

static int open_file(const struct kind_of_file *k)
{
    int fd = k->memory ? memfd_create("disk", MFD_CLOEXEC)
                       : open(".", O_TMPFILE | O_RDWR | O_CLOEXEC | (k->direct ? O_DIRECT : 0), 0600);
    if (fd >= 0)
        CHECK_EQUAL(ftruncate(fd, BYTES), 0);
    return fd;
}

static vs_disk *open_disk(const struct kind_of_file *k, int *fd)
{
    struct vs_disk_probe probe;
    *fd = open_file(k);
    if (*fd < 0)
        return NULL; /* no such files in this directory */
    CHECK_EQUAL(vs_disk_probe_fd(*fd, k->direct, &probe), 0);
    CHECK_EQUAL(probe.bytes, BYTES);
    CHECK_EQUAL(probe.inline_io, k->memory);
    CHECK(!probe.is_block_device && probe.logical_block_bytes >= 512);
    vs_disk *disk = vs_disk_file(dup(*fd), &probe, k->direct);
    CHECK(disk);
    disk_adopt(disk, &host);
    return disk;
}

static void compare(vs_disk *disk)
{
    memset(buffer, 0xee, BYTES);
    CHECK_EQUAL(call(disk, VS_DISK_READ, 0, BYTES, buffer), 0);
    CHECK(memcmp(buffer, mirror, BYTES) == 0);
}

static void contents(const struct kind_of_file *k)
{
    static const uint64_t cuts[][2] = {{0, 4096},
                                       {4096, 65536},
                                       {1 << 20, 1 << 20},
                                       {12288, 131072 + 4096},
                                       {1 << 20, (3 << 20) - 4096},
                                       {BYTES - 4096, 4096},
                                       {0, BYTES}};
    uint64_t state = 77;
    int fd;
    vs_disk *disk = open_disk(k, &fd);
    if (!disk) {
        printf("# no %s files here: %s\n", k->name, strerror(errno));
        return;
    }
    memset(mirror, 0, BYTES);
    compare(disk); /* a hole */
    CHECK_EQUAL(data_at(disk, 0, BYTES), BYTES);
    for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; i++) {
        for (int unmap = 0; unmap < 2; unmap++) {
            for (uint64_t b = 0; b < BYTES; b += 512)
                memset(mirror + b, (int)(1 + (b / 512 + i) % 255), 512);
            memcpy(buffer, mirror, BYTES);
            CHECK_EQUAL(call(disk, VS_DISK_WRITE, 0, BYTES, buffer), 0);
            CHECK_EQUAL(data_at(disk, 0, BYTES), 0);
            compare(disk);
            CHECK_EQUAL(zero(disk, cuts[i][0], cuts[i][1], unmap), 0);
            memset(mirror + cuts[i][0], 0, cuts[i][1]);
            compare(disk);
        }
    }
    CHECK_EQUAL(call(disk, VS_DISK_FLUSH, 0, 0, NULL), 0);
    /* Many at once, in pieces. */
    static struct call calls[IOS];
    for (unsigned round = 0; round < 4; round++) {
        uint64_t part = BYTES / IOS;
        for (unsigned i = 0; i < IOS; i++) {
            uint64_t at = i * part;
            struct call *c = &calls[i];
            for (uint64_t b = 0; b < part; b += 512)
                memset(buffer + at + b, (int)test_random(&state), 512);
            memcpy(mirror + at, buffer + at, part);
            *c = (struct call){.io = {.kind = VS_DISK_WRITE,
                                      .offset = at,
                                      .length = part,
                                      .iov = c->iov,
                                      .iov_count = 4,
                                      .thread = (thread + i) % host.threads.count,
                                      .done = on_done}};
            for (unsigned n = 0; n < 4; n++)
                c->iov[n] = (struct iovec){buffer + at + n * part / 4, part / 4};
            disk_submit(disk, &c->io);
        }
        for (unsigned i = 0; i < IOS; i++)
            CHECK_EQUAL(finish_call(&calls[i]), 0);
        compare(disk);
    }
    CHECK_EQUAL(disk->stats.in_flight, 0);
    CHECK(disk->stats.op[VS_DISK_WRITE].operations >= 4 * IOS);
    CHECK_EQUAL(disk->stats.op[VS_DISK_FLUSH].operations, 1);
    /* The file became shorter than the disk: an error, not less data. */
    CHECK_EQUAL(ftruncate(fd, BYTES / 2), 0);
    CHECK_EQUAL(call(disk, VS_DISK_READ, BYTES / 2, 4096, buffer), -EIO);
    CHECK_EQUAL(call(disk, VS_DISK_READ, BYTES / 2 - 4096, 8192, buffer), -EIO);
    CHECK_EQUAL(disk->stats.op[VS_DISK_READ].errors, 2);
    disk_close(disk);
    close(fd);
}

static void in_memory(void)
{
    contents(&(struct kind_of_file){"memory", false, true});
}

static void buffered(void)
{
    contents(&(struct kind_of_file){"buffered", false, false});
}

static void direct(void)
{
    contents(&(struct kind_of_file){"direct", true, false});
}

static void errors(void)
{
    static const struct kind_of_file kinds[] = {{"memory", false, true}, {"buffered", false, false}};
    for (int i = 0; i < 2; i++) {
        int fd;
        vs_disk *disk = open_disk(&kinds[i], &fd);
        if (!disk)
            continue;
        /* The descriptor stays; what it refers to does not take writes. */
        struct vs_disk_probe probe;
        char path[64];
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        int read_only = open(path, O_RDONLY | O_CLOEXEC);
        CHECK(read_only >= 0);
        CHECK_EQUAL(vs_disk_probe_fd(read_only, 0, &probe), 0);
        vs_disk *other = vs_disk_file(read_only, &probe, 0);
        disk_adopt(other, &host);
        CHECK_EQUAL(call(other, VS_DISK_WRITE, 0, 4096, buffer), -EBADF);
        CHECK_EQUAL(zero(other, 0, 4096, true), -EBADF);
        CHECK_EQUAL(call(other, VS_DISK_READ, 0, 4096, buffer), 0);
        disk_close(other);
        disk_close(disk);
        close(fd);
    }
    int ends[2];
    struct vs_disk_probe probe;
    CHECK_EQUAL(pipe(ends), 0);
    CHECK_EQUAL(vs_disk_probe_fd(ends[0], 0, &probe), -ENOTBLK);
    CHECK_EQUAL(vs_disk_probe_fd(-1, 0, &probe), -EBADF);
    close(ends[0]);
    close(ends[1]);
}

/* Writes that the file takes only in part: what is left is written too, or is an error. */
static void no_space(void)
{
    struct rlimit old, limit = {1 << 20, RLIM_INFINITY};
    int fd;
    vs_disk *disk = open_disk(&(struct kind_of_file){"memory", false, true}, &fd);
    CHECK_EQUAL(ftruncate(fd, 0), 0);
    CHECK_EQUAL(getrlimit(RLIMIT_FSIZE, &old), 0);
    limit.rlim_max = old.rlim_max;
    CHECK(signal(SIGXFSZ, SIG_IGN) != SIG_ERR);
    CHECK_EQUAL(setrlimit(RLIMIT_FSIZE, &limit), 0);
    int result = call(disk, VS_DISK_WRITE, (1 << 20) - 4096, 8192, buffer);
    CHECK_EQUAL(setrlimit(RLIMIT_FSIZE, &old), 0);
    CHECK(result == -EFBIG || result == -ENOSPC);
    CHECK_EQUAL(disk->stats.op[VS_DISK_WRITE].errors, 1);
    CHECK_EQUAL(disk->stats.op[VS_DISK_WRITE].bytes, 0);
    disk_close(disk);
    close(fd);
}

/* Either side may be about to sleep each time: no wake-up is lost. */
static void one_by_one(void)
{
    int fd;
    vs_disk *disk = open_disk(&(struct kind_of_file){"memory", false, true}, &fd);
    struct call other = {0};
    for (unsigned i = 0; i < 5000; i++) {
        thread = 2;
        start(disk, &other, VS_DISK_READ, 4096, 4096, buffer + 4096);
        thread = 1;
        CHECK_EQUAL(call(disk, VS_DISK_WRITE, 0, 512, buffer), 0);
        CHECK_EQUAL(finish_call(&other), 0);
    }
    CHECK_EQUAL(disk->stats.op[VS_DISK_WRITE].operations, 5000);
    disk_close(disk);
    close(fd);
}

static unsigned closings;

static void on_closed(struct disk_io *closing)
{
    closings++;
    disk_free(container_of(closing, struct vs_disk, closing));
}

/* As the data thread does it: by the worker, which is gone with the disk. */
static void closed_later(void)
{
    int fd;
    vs_disk *disk = open_disk(&(struct kind_of_file){"memory", false, true}, &fd);
    unsigned before = closings;
    disk_close_later(disk, on_closed, NULL);
    CHECK_EQUAL(closings, before); /* never from within */
    while (closings == before)
        turn();
    close(fd);
}

/* ---- disk.c with a disk that does as it is told ----------------------------------- */

static int told;

static void told_submit(vs_disk *disk, struct disk_io *io)
{
    (void)disk;
    disk_complete(io, told);
}

static void told_close(vs_disk *disk)
{
    (void)disk;
}

static uint64_t size(vs_disk *disk)
{
    struct call c = {0};
    start(disk, &c, VS_DISK_SIZE, 0, 0, NULL);
    CHECK_EQUAL(finish_call(&c), 0);
    return c.io.size_bytes;
}

/* What a kind leaves out never comes to it. */
static void left_out(void)
{
    static const struct disk_ops ops = {.submit = told_submit, .close = told_close};
    vs_disk disk;
    struct call c = {.io.to_data_end = true};
    unsigned before = closings;
    disk_init(&disk, &ops, BYTES, 512, 1, 0);
    disk_adopt(&disk, &host);
    told = -EIO;
    start(&disk, &c, VS_DISK_EXTENTS, 4096, 8192, NULL);
    CHECK_EQUAL(finish_call(&c), 0);
    CHECK(c.io.data_at == 4096 && c.io.data_end == 4096 + 8192);
    CHECK_EQUAL(size(&disk), BYTES);
    disk_close_later(&disk, on_closed, NULL);
    CHECK_EQUAL(closings, before);
    while (closings == before)
        turn();
    CHECK_EQUAL(disk.closing.result, 0);
}

/* Not as it was when it was opened. */
static void sizes(void)
{
    static const struct kind_of_file kinds[] = {{"memory", false, true}, {"buffered", false, false}};
    for (int i = 0; i < 2; i++) {
        int fd;
        vs_disk *disk = open_disk(&kinds[i], &fd);
        CHECK_EQUAL(size(disk), BYTES);
        CHECK_EQUAL(ftruncate(fd, BYTES + 4096), 0);
        CHECK_EQUAL(size(disk), BYTES + 4096);
        disk_close(disk);
        close(fd);
    }
}

/* Behind the page cache a second fdatasync succeeds without the data, so the first failure stays one. */
static void failed_flushes(void)
{
    static const struct disk_ops ops = {.submit = told_submit, .close = told_close};
    for (int forgets = 0; forgets < 2; forgets++) {
        vs_disk disk;
        disk_init(&disk, &ops, BYTES, 512, 1, forgets ? DISK_FORGETS_FAILED_FLUSH : 0);
        disk_adopt(&disk, &host);
        told = 0;
        CHECK_EQUAL(call(&disk, VS_DISK_FLUSH, 0, 0, NULL), 0);
        told = -EIO;
        CHECK_EQUAL(call(&disk, VS_DISK_WRITE, 0, 512, buffer), -EIO);
        CHECK_EQUAL(call(&disk, VS_DISK_FLUSH, 0, 0, NULL), -EIO);
        told = 0;
        CHECK_EQUAL(call(&disk, VS_DISK_FLUSH, 0, 0, NULL), forgets ? -EIO : 0);
        CHECK_EQUAL(call(&disk, VS_DISK_WRITE, 0, 512, buffer), 0);
        disk_close(&disk);
    }
}

/* A block device is told to zero a little at a time, so that it is seen to come on, and more as long as it is quick. */
static void zeroing_of_block_devices(void)
{
    const uint64_t bytes = 64u << 20;
    for (uint64_t takes_ns = 0; takes_ns <= 1000000000; takes_ns += 1000000000) {
        struct vs_disk_probe probe = {bytes, 1, 512, 512, 512, 0, 512, 0};
        int fd = open(".", O_TMPFILE | O_RDWR, 0600);
        struct call c = {0};
        unsigned steps = 1;
        CHECK_EQUAL(ftruncate(fd, (off_t)bytes), 0);
        vs_disk *disk = vs_disk_file(fd, &probe, 0);
        disk_adopt(disk, &host);
        start(disk, &c, VS_DISK_ZERO, 0, bytes, NULL);
        for (uint64_t seen = 0; !c.done; steps += c.io.work.transferred != seen && !c.done) {
            seen = c.io.work.transferred;
            host.now_ns += takes_ns;
            turn();
            CHECK(c.done || disk_oldest_ns(disk) == host.now_ns || c.io.work.transferred == seen);
        }
        CHECK_EQUAL(c.io.result, 0);
        CHECK_EQUAL(steps, takes_ns ? 64 : 7); /* 1, 2, 4 … MiB */
        disk_close(disk);
    }
}

/* Which disks are behind it: all files, since direct I/O to a file goes through the page cache where it has to (zeroing
 * a part of a block, checksums), and block devices that are not opened for direct I/O. */
static void failed_flushes_of_files(void)
{
    for (int is_block_device = 0; is_block_device < 2; is_block_device++)
        for (int is_direct = 0; is_direct < 2; is_direct++) {
            struct vs_disk_probe probe = {BYTES, (uint32_t)is_block_device, 512, 512, 512, 0, 512, 0};
            int file = open(".", O_TMPFILE | O_RDWR, 0600), fd = dup(file), ends[2];
            vs_disk *disk = vs_disk_file(fd, &probe, is_direct);
            CHECK(disk != NULL);
            disk_adopt(disk, &host);
            CHECK_EQUAL(call(disk, VS_DISK_FLUSH, 0, 0, NULL), 0);
            CHECK_EQUAL(pipe(ends), 0);
            CHECK_EQUAL(dup2(ends[1], fd), fd); /* cannot be flushed */
            CHECK_EQUAL(call(disk, VS_DISK_FLUSH, 0, 0, NULL), -EINVAL);
            CHECK_EQUAL(dup2(file, fd), fd);
            CHECK_EQUAL(call(disk, VS_DISK_FLUSH, 0, 0, NULL), is_block_device && is_direct ? 0 : -EIO);
            disk_close(disk);
            close(ends[0]);
            close(ends[1]);
            close(file);
        }
}

static void iovecs(void)
{
    struct iovec iov[3] = {{buffer, 10}, {buffer + 100, 20}, {buffer + 200, 30}};
    struct disk_io io = {.iov = iov, .iov_count = 3};
    CHECK_EQUAL(iov_bytes(iov, 3), 60);
    disk_io_advance(&io, 5);
    CHECK(io.iov == iov && io.iov_count == 3 && iov[0].iov_base == buffer + 5 && iov[0].iov_len == 5);
    disk_io_advance(&io, 5);
    CHECK(io.iov == iov + 1 && io.iov_count == 2);
    CHECK(iov[0].iov_base == buffer && iov[0].iov_len == 10); /* as the caller gave it */
    disk_io_advance(&io, 21);
    CHECK(io.iov == iov + 2 && io.iov_count == 1 && iov[2].iov_base == buffer + 201 && iov[2].iov_len == 29);
    disk_io_advance(&io, 2);
    CHECK(iov[2].iov_base == buffer + 203 && iov[2].iov_len == 27);
    disk_io_restore(&io);
    CHECK(iov[2].iov_base == buffer + 200 && iov[2].iov_len == 30);
    disk_io_advance(&io, 30);
    CHECK_EQUAL(io.iov_count, 0);
    CHECK_EQUAL(iov_bytes(iov, 3), 60);
}

static void latencies(void)
{
    struct vs_op_stats s = {0};
    op_stats_add(&s, 10, 0, false);
    op_stats_add(&s, 10, 1, false);
    op_stats_add(&s, 10, 1023, false);
    op_stats_add(&s, 10, 1024, true);
    op_stats_add(&s, 10, UINT64_MAX / 2, false);
    CHECK_EQUAL(s.operations, 5);
    CHECK_EQUAL(s.bytes, 40);
    CHECK_EQUAL(s.errors, 1);
    CHECK_EQUAL(s.latency_ns_log2[0], 2);
    CHECK_EQUAL(s.latency_ns_log2[9], 1);
    CHECK_EQUAL(s.latency_ns_log2[10], 1);
    CHECK_EQUAL(s.latency_ns_log2[VS_LATENCY_BUCKETS - 1], 1);
}

int main(void)
{
    const char *step = "";
    buffer = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(buffer != MAP_FAILED);
    CHECK_EQUAL(uring_init(&uring, 64, 256, &step), 0); /* smaller than what is asked at once: it submits by itself */
    int wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    disk_host_init(&host, &uring, wake_fd);
    woken.complete = on_wake;
    struct io_uring_sqe *sqe = uring_sqe(&uring, &woken);
    io_uring_prep_poll_multishot(sqe, wake_fd, POLLIN);
    io_uring_sqe_set_data(sqe, &woken);
    for (thread = 0; thread < 2; thread++) {
        if (thread)
            CHECK_EQUAL(io_threads_start(&host.threads, 3, wake_fd, &step), 0);
        test(thread ? "a file in memory, on a thread" : "a file in memory", in_memory);
        test(thread ? "a buffered file, on a thread" : "a buffered file", buffered);
        test(thread ? "a direct file, on a thread" : "a direct file", direct);
        test(thread ? "errors, on a thread" : "errors", errors);
        test(thread ? "no space, on a thread" : "no space", no_space);
    }
    test("one by one", one_by_one);
    CHECK(io_threads_syscalls(&host.threads) > 0);
    io_threads_stop(&host.threads);
    thread = 0;
    test("closed later", closed_later);
    test("what a kind leaves out", left_out);
    test("sizes", sizes);
    test("failed flushes", failed_flushes);
    test("failed flushes of files", failed_flushes_of_files);
    test("zeroing of block devices", zeroing_of_block_devices);
    test("iovecs", iovecs);
    test("latencies", latencies);
    CHECK_EQUAL(uring.in_flight, 1); /* the watch */
    disk_host_free(&host);
    uring_free(&uring);
    close(wake_fd);
    return tests_end();
}
