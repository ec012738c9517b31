/* SPDX-License-Identifier: Apache-2.0
 *
 * A disk on a file or block device, through io_uring; on memory-backed files
 * (tmpfs) by plain calls, because there io_uring would only hand every request
 * to a worker thread. What io_uring has no operation for, or would do on the
 * thread that enters it, is done by a worker of the disk's own (disk_worker.h):
 * a file system that hangs in it holds up nobody else.
 *
 * A short transfer is continued, EINTR and EAGAIN are tried again. Zeroing
 * goes down a ladder until a step is supported: punch a hole (if asked to),
 * zero the range, write zeroes. All of them read back as zeroes.
 */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include "disk.h"
#include "disk_worker.h"

#ifndef FUSE_SUPER_MAGIC
#define FUSE_SUPER_MAGIC 0x65735546
#endif

/* What zeroes are written from; a zero step writes at most ZERO_IOV of them at once. */
#define ZERO_BYTES (64u << 10)
#define ZERO_IOV 16
static _Alignas(4096) uint8_t zeroes[ZERO_BYTES];
/* A block device may have to write what it is told to zero, and within one call nobody sees it come on: so it is told
 * so much at a time, and twice as much as long as that was quick. */
#define ZERO_STEP_BYTES (1u << 20)
#define ZERO_QUICK_NS 10000000u

enum zero_step { ZERO_PUNCH, ZERO_RANGE, ZERO_WRITE };

struct file_disk {
    struct vs_disk disk;
    int fd;
    bool inline_io, may_block; /* vs_disk_probe */
    bool is_block_device;
    bool no_punch, no_zero_range; /* learnt from EOPNOTSUPP */
    bool closed;                  /* or being closed, by the worker, which ends with that */
    struct disk_worker worker;
};

static void stepped(struct disk_io *io, int result);

/* A whole array of zeroes; shared, so nobody changes it. */
static struct iovec zero_iov[ZERO_IOV] = {[0 ... ZERO_IOV - 1] = {zeroes, ZERO_BYTES}};

/* Of a zeroing, what its next step is to cover. */
static uint64_t zero_bytes(const struct disk_io *io)
{
    uint64_t left = io->length - io->work.transferred;
    return left < io->work.step_bytes ? left : io->work.step_bytes;
}

static int zero_mode(int step)
{
    return FALLOC_FL_KEEP_SIZE | (step == ZERO_PUNCH ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
}

/* One plain call: what is short of the operation's end is done by the next one. */
static int perform(const struct file_disk *f, const struct disk_io *io)
{
    off_t at = (off_t)(io->offset + io->work.transferred);
    uint64_t left = io->length - io->work.transferred;
    ssize_t n;
    switch (io->kind) {
    case VS_DISK_READ:
        n = io->iov_count == 1 ? pread(f->fd, io->iov->iov_base, io->iov->iov_len, at)
                               : preadv(f->fd, io->iov, io->iov_count, at);
        break;
    case VS_DISK_WRITE:
        n = io->iov_count == 1 ? pwrite(f->fd, io->iov->iov_base, io->iov->iov_len, at)
                               : pwritev(f->fd, io->iov, io->iov_count, at);
        break;
    case VS_DISK_FLUSH:
        n = fdatasync(f->fd);
        break;
    default:
        if (io->work.step != ZERO_WRITE)
            n = fallocate(f->fd, zero_mode(io->work.step), at, (off_t)zero_bytes(io));
        else if (left >= sizeof zeroes * ZERO_IOV)
            n = pwritev(f->fd, zero_iov, ZERO_IOV, at);
        else
            n = pwrite(f->fd, zeroes, left < ZERO_BYTES ? left : ZERO_BYTES, at);
    }
    return n < 0 ? -errno : (int)n;
}

/* The same for a ring. The iovec array must outlive the submission: it does, being the caller's until done(). */
static void prepare(const struct file_disk *f, struct disk_io *io, struct uring *uring)
{
    struct io_uring_sqe *sqe = uring_sqe(uring, &io->work.job.op);
    uint64_t at = io->offset + io->work.transferred;
    uint64_t left = io->length - io->work.transferred;
    switch (io->kind) {
    case VS_DISK_READ:
        if (io->iov_count == 1)
            io_uring_prep_read(sqe, f->fd, io->iov->iov_base, (unsigned)io->iov->iov_len, at);
        else
            io_uring_prep_readv(sqe, f->fd, io->iov, (unsigned)io->iov_count, at);
        break;
    case VS_DISK_WRITE:
        if (io->iov_count == 1)
            io_uring_prep_write(sqe, f->fd, io->iov->iov_base, (unsigned)io->iov->iov_len, at);
        else
            io_uring_prep_writev(sqe, f->fd, io->iov, (unsigned)io->iov_count, at);
        break;
    case VS_DISK_FLUSH:
        io_uring_prep_fsync(sqe, f->fd, IORING_FSYNC_DATASYNC);
        break;
    default:
        if (io->work.step != ZERO_WRITE)
            io_uring_prep_fallocate(sqe, f->fd, zero_mode(io->work.step), (off_t)at, (off_t)zero_bytes(io));
        else if (left >= sizeof zeroes * ZERO_IOV)
            io_uring_prep_writev(sqe, f->fd, zero_iov, ZERO_IOV, at);
        else
            io_uring_prep_write(sqe, f->fd, zeroes, left < ZERO_BYTES ? (unsigned)left : ZERO_BYTES, at);
    }
    io_uring_sqe_set_data(sqe, &io->work.job.op); /* older liburing's prep helpers clear it */
    if (f->may_block)
        io_uring_sqe_set_flags(sqe, IOSQE_ASYNC);
}

/* On an I/O thread, which only reads what it is lent. */
static bool start_job(struct io_job *job, struct uring *uring, int *result)
{
    struct disk_io *io = container_of(job, struct disk_io, work.job);
    struct file_disk *f = container_of(io->work.disk, struct file_disk, disk);
    if (f->inline_io)
        *result = perform(f, io);
    else
        prepare(f, io, uring);
    return f->inline_io;
}

/* The next step of io. */
static void issue(struct file_disk *f, struct disk_io *io)
{
    if (io->thread > 0)
        io_threads_lend(&f->disk.host->threads, io->thread, &io->work.job);
    else if (f->inline_io)
        stepped(io, perform(f, io));
    else
        prepare(f, io, f->disk.host->uring);
}

/* A step down the ladder; false: there is none left. */
static bool zero_fall_back(struct file_disk *f, struct disk_io *io, int error)
{
    if (io->work.step == ZERO_WRITE)
        return false;
    if (error != EOPNOTSUPP && error != ENOSYS && error != EINVAL && error != ENODEV && error != EPERM)
        return false;
    if (error == EOPNOTSUPP || error == ENOSYS) {
        if (io->work.step == ZERO_PUNCH)
            f->no_punch = true;
        else
            f->no_zero_range = true;
    }
    io->work.step = io->work.step == ZERO_PUNCH && !f->no_zero_range ? ZERO_RANGE : ZERO_WRITE;
    return true;
}

/* A step that was no write. */
static void zeroed(struct file_disk *f, struct disk_io *io)
{
    io->work.transferred += zero_bytes(io);
    if (io->work.transferred == io->length) {
        disk_complete(io, 0);
        return;
    }
    if (f->disk.host->now_ns - io->work.progress_ns < ZERO_QUICK_NS)
        io->work.step_bytes *= 2;
    disk_progress(io);
    issue(f, io);
}

static void stepped(struct disk_io *io, int result)
{
    struct file_disk *f = container_of(io->work.disk, struct file_disk, disk);
    if (result == -EINTR || result == -EAGAIN) {
        issue(f, io);
        return;
    }
    if (result < 0) {
        if (io->kind == VS_DISK_ZERO && zero_fall_back(f, io, -result))
            issue(f, io);
        else
            disk_complete(io, result);
        return;
    }
    if (io->kind == VS_DISK_FLUSH) {
        disk_complete(io, 0);
        return;
    }
    if (io->kind == VS_DISK_ZERO && io->work.step != ZERO_WRITE) {
        zeroed(f, io);
        return;
    }
    if (result == 0) { /* the file is shorter than it was, or takes no more */
        disk_complete(io, io->kind == VS_DISK_READ ? -EIO : -ENOSPC);
        return;
    }
    io->work.transferred += (uint64_t)result;
    if (io->work.transferred == io->length) {
        disk_complete(io, 0);
        return;
    }
    disk_progress(io);
    if (io->kind != VS_DISK_ZERO)
        disk_io_advance(io, (uint64_t)result);
    issue(f, io);
}

static void file_complete(struct uring_op *op, int result, unsigned flags)
{
    (void)flags;
    stepped(container_of(op, struct disk_io, work.job.op), result);
}

static void job_over(struct io_job *job)
{
    stepped(container_of(job, struct disk_io, work.job), job->result);
}

/* Unknown counts as data. */
static void find_extent(const struct file_disk *f, struct disk_io *io)
{
    uint64_t end = io->offset + io->length;
    off_t at = lseek(f->fd, (off_t)io->offset, SEEK_DATA);
    disk_all_data(io);
    if (at < 0)
        io->data_at = errno == ENXIO ? end : io->offset; /* ENXIO: a hole up to the file's end */
    else
        io->data_at = (uint64_t)at < end ? (uint64_t)at : end;
    if (!io->to_data_end || io->data_at != io->offset)
        return;
    at = lseek(f->fd, (off_t)io->offset, SEEK_HOLE);
    if (at > (off_t)io->offset && (uint64_t)at < end)
        io->data_end = (uint64_t)at;
}

/* Of what is open: another file may have its name by now. */
static int find_size(const struct file_disk *f, struct disk_io *io)
{
    struct stat st;
    if (f->is_block_device)
        return ioctl(f->fd, BLKGETSIZE64, &io->size_bytes) < 0 ? -errno : 0;
    if (fstat(f->fd, &st) < 0)
        return -errno;
    io->size_bytes = (uint64_t)st.st_size;
    return 0;
}

/* On the worker. */
static int errand(struct disk_io *io)
{
    struct file_disk *f = container_of(io->work.disk, struct file_disk, disk);
    if (io->kind == VS_DISK_SIZE)
        return find_size(f, io);
    if (io->kind == VS_DISK_EXTENTS)
        find_extent(f, io);
    else
        close(f->fd);
    return 0;
}

static void submit_errand(struct file_disk *f, struct disk_io *io)
{
    if (io->kind == VS_DISK_CLOSE) {
        f->closed = true;
        disk_worker_give_last(&f->worker, io);
    } else if (f->inline_io) {
        disk_complete(io, errand(io));
    } else {
        disk_worker_give(&f->worker, io);
    }
}

static void file_submit(struct vs_disk *disk, struct disk_io *io)
{
    struct file_disk *f = container_of(disk, struct file_disk, disk);
    if (io->kind >= VS_DISK_OPS) {
        submit_errand(f, io);
        return;
    }
    if (io->thread == 0) {
        io->work.job.op.complete = file_complete;
    } else {
        io->work.job.start = start_job;
        io->work.job.over = job_over;
    }
    io->work.step_bytes = f->is_block_device ? ZERO_STEP_BYTES : UINT64_MAX;
    if (io->kind == VS_DISK_ZERO)
        io->work.step = io->may_unmap && !f->no_punch ? ZERO_PUNCH : !f->no_zero_range ? ZERO_RANGE : ZERO_WRITE;
    issue(f, io);
}

static void file_close(struct vs_disk *disk)
{
    struct file_disk *f = container_of(disk, struct file_disk, disk);
    if (!f->closed) {
        disk_worker_end(&f->worker);
        close(f->fd);
    }
    free(f);
}

static const struct disk_ops file_ops = {
    .submit = file_submit,
    .close = file_close,
};

int vs_disk_probe_fd(int fd, int direct, struct vs_disk_probe *out)
{
    struct stat st;
    struct statfs fs;
    memset(out, 0, sizeof *out);
    if (fstat(fd, &st) < 0 || fstatfs(fd, &fs) < 0)
        return -errno;
    out->logical_block_bytes = 512;
    out->physical_block_bytes = 512;
    out->memory_align_bytes = direct ? 4096 : 1;
    if (S_ISBLK(st.st_mode)) {
        int logical = 512;
        unsigned physical = 512;
        out->is_block_device = 1;
        if (ioctl(fd, BLKGETSIZE64, &out->bytes) < 0 || ioctl(fd, BLKSSZGET, &logical) < 0)
            return -errno;
        if (ioctl(fd, BLKPBSZGET, &physical) < 0)
            physical = (unsigned)logical;
        out->logical_block_bytes = (uint32_t)logical;
        out->physical_block_bytes = physical;
        out->discard_granularity_bytes = out->logical_block_bytes;
        if (direct)
            out->memory_align_bytes = out->logical_block_bytes;
    } else if (S_ISREG(st.st_mode)) {
        out->bytes = (uint64_t)st.st_size;
        out->physical_block_bytes = (uint32_t)st.st_blksize;
        out->discard_granularity_bytes = (uint32_t)st.st_blksize;
        out->inline_io = fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC;
        /* Its files can be polled, which newer kernels take for a promise not to block, and know no IOCB_NOWAIT. */
        out->may_block = fs.f_type == FUSE_SUPER_MAGIC;
    } else {
        return -ENOTBLK;
    }
#ifdef STATX_DIOALIGN
    struct statx sx;
    if (direct && statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &sx) == 0 && (sx.stx_mask & STATX_DIOALIGN) &&
        sx.stx_dio_offset_align) {
        if (sx.stx_dio_offset_align > out->logical_block_bytes)
            out->logical_block_bytes = sx.stx_dio_offset_align;
        out->memory_align_bytes = sx.stx_dio_mem_align;
    }
#endif
    if (out->inline_io)
        out->memory_align_bytes = 1;
    if (out->physical_block_bytes < out->logical_block_bytes)
        out->physical_block_bytes = out->logical_block_bytes;
    return 0;
}

static uint32_t abilities(const struct vs_disk_probe *probe, int direct)
{
    uint32_t can = DISK_TELLS_SIZE | DISK_CLOSES_LATER;
    if (!probe->is_block_device)
        can |= DISK_TELLS_EXTENTS; /* devices do not say */
    /* The page cache counts as clean what it could not write. Direct I/O to a file falls back to it here and there. */
    if (!direct || !probe->is_block_device)
        can |= DISK_FORGETS_FAILED_FLUSH;
    return can;
}

vs_disk *vs_disk_file(int fd, const struct vs_disk_probe *probe, int direct)
{
    struct file_disk *f = calloc(1, sizeof *f);
    int rc = f ? disk_worker_start(&f->worker, errand) : -ENOMEM;
    if (rc < 0) {
        free(f);
        errno = -rc;
        return NULL;
    }
    f->fd = fd;
    f->inline_io = probe->inline_io;
    f->may_block = probe->may_block;
    f->is_block_device = probe->is_block_device;
    disk_init(&f->disk, &file_ops, probe->bytes, probe->logical_block_bytes, probe->memory_align_bytes,
              abilities(probe, direct));
    return &f->disk;
}
