/* SPDX-License-Identifier: Apache-2.0
 *
 * An operation as commands of NBD, and their answers. libnbd calls back within its own calls, on the disk's thread.
 */
#include <errno.h>

#include "nbd_disk.h"

/* One command's range without data: its length is a word of 32 bits. */
#define RANGE_BYTES (1u << 30)
/* A server may have to write what it is told to zero, and within one command nobody sees it come on: so it is told so
 * much at a time, and twice as much as long as that was quick. */
#define ZERO_STEP_BYTES (1u << 20)
#define ZERO_QUICK_NS 10000000u
/* Extents of zeroes are followed through so many answers; what lies beyond counts as data. */
#define EXTENT_ANSWERS 64

/* A zeroing goes down this ladder until a step is supported. */
enum zero_step { ZERO_FAST, ZERO_COMMAND, ZERO_WRITE };

/* What zeroes are written from; never touched, so it takes no memory. */
static uint8_t zeroes[ZERO_STEP_BYTES];

static struct nbd_disk *disk_of(const struct disk_io *io)
{
    return (struct nbd_disk *)io->work.disk;
}

static struct nbd_handle *next_handle(struct nbd_disk *d)
{
    return d->nbd->handle[d->next_handle++ % d->nbd->connections];
}

/* ---- answers -------------------------------------------------------------------- */

/* What the server says in a protocol's word, in those of a disk that fails: the engine takes these for its own. */
static int of_disk(int error)
{
    return error == EINVAL || error == ENOMEM || error == EFAULT || error == EBADF || error <= 0 ? -EIO : -error;
}

static void settle(struct nbd_disk *d, struct disk_io *io, int result)
{
    io->result = result;
    list_remove(&io->work.remote_link);
    list_append(&d->over, &io->work.remote_link);
}

static void settle_extents(struct nbd_disk *d, struct disk_io *io, uint64_t data_at, uint64_t data_end)
{
    io->data_at = data_at;
    io->data_end = data_end;
    settle(d, io, 0);
}

void nbd_fail(struct nbd_disk *d, struct disk_io *io, int result)
{
    if (io->kind == VS_DISK_EXTENTS) /* never fails: what is not known counts as data */
        settle_extents(d, io, io->offset + io->work.transferred, io->offset + io->length);
    else
        settle(d, io, result);
}

static void part_is_done(struct nbd_disk *d, struct disk_io *io, uint64_t bytes)
{
    io->work.transferred += bytes;
    settle(d, io, io->work.transferred < io->length ? DISK_GO_ON : 0);
}

/* libnbd's callbacks return 1: the command is retired. They run within its calls, and call none. */

static int transferred(void *arg, int *error)
{
    struct disk_io *io = arg;
    if (*error)
        nbd_fail(disk_of(io), io, of_disk(*error));
    else
        part_is_done(disk_of(io), io, io->work.step_bytes);
    return 1;
}

static int zeroed(void *arg, int *error)
{
    struct disk_io *io = arg;
    struct nbd_disk *d = disk_of(io);
    bool unsupported = *error == ENOTSUP || *error == EINVAL;
    if (!*error) {
        part_is_done(d, io, io->work.step_bytes);
    } else if (unsupported && io->work.step != ZERO_WRITE) {
        d->no_fast_zero |= io->work.step == ZERO_FAST;
        io->work.step++;
        io->work.step_bytes = 0;
        settle(d, io, DISK_GO_ON); /* the same part again, otherwise */
    } else {
        nbd_fail(d, io, of_disk(*error));
    }
    return 1;
}

static int flushed(void *arg, int *error)
{
    struct disk_io *io = arg;
    settle(disk_of(io), io, *error ? of_disk(*error) : 0);
    return 1;
}

static int durable_now(void *arg, int *error)
{
    struct nbd_disk *d = arg;
    d->durable_failed |= *error != 0;
    d->durable = --d->durable_asked == 0 && d->served && !d->durable_failed;
    return 1;
}

void nbd_begin_durable(struct nbd_disk *d)
{
    nbd_completion_callback answer = {.callback = durable_now, .user_data = d};
    if (d->durable_asked == 0)
        d->durable_failed = false;
    d->durable_asked++;
    if (nbd_aio_flush(next_handle(d), answer, 0) < 0) {
        d->durable_asked--;
        d->durable_failed = true;
    }
}

/* Of base:allocation: what reads as zeroes counts as a hole. */
static int extents_told(void *arg, const char *context, uint64_t offset, uint32_t *entries, size_t count, int *error)
{
    struct disk_io *io = arg;
    uint64_t at = offset, end = io->offset + io->length;
    (void)context;
    if (*error || offset != io->offset + io->work.transferred)
        return 0;
    for (size_t i = 0; i + 1 < count && at < end; i += 2) {
        bool zero = entries[i + 1] & LIBNBD_STATE_ZERO;
        if (zero && io->data_at < at) /* the data ends here */
            break;
        at += entries[i] < end - at ? entries[i] : end - at;
        if (zero)
            io->data_at = at;
        io->data_end = at;
    }
    return 0;
}

static int extents_over(void *arg, int *error)
{
    struct disk_io *io = arg;
    struct nbd_disk *d = disk_of(io);
    uint64_t end = io->offset + io->length, known = io->offset + io->work.transferred;
    if (*error || io->data_end <= known) /* nothing was told */
        nbd_fail(d, io, 0);
    else if (io->data_at < io->data_end) /* data is found */
        settle_extents(d, io, io->data_at, io->to_data_end ? io->data_end : end);
    else if (io->data_at >= end || ++io->work.step >= EXTENT_ANSWERS)
        settle_extents(d, io, io->data_at, end);
    else
        part_is_done(d, io, io->data_at - known);
    return 1;
}

/* ---- commands ---------------------------------------------------------------------- */

static uint64_t part_of(const struct nbd_disk *d, uint64_t bytes, uint64_t most)
{
    most -= most % d->disk.block_bytes;
    return bytes < most ? bytes : most;
}

static int64_t transfer(struct nbd_disk *d, struct disk_io *io)
{
    struct nbd_handle *handle = next_handle(d);
    uint64_t at = io->offset + io->work.transferred;
    char *buffer = (char *)io->iov->iov_base + io->work.transferred;
    nbd_completion_callback answer = {.callback = transferred, .user_data = io};
    io->work.step_bytes = part_of(d, io->length - io->work.transferred, d->nbd->export.maximum_bytes);
    if (io->kind == VS_DISK_READ)
        return nbd_aio_pread(handle, buffer, io->work.step_bytes, at, answer, 0);
    return nbd_aio_pwrite(handle, buffer, io->work.step_bytes, at, answer, io->work.durable ? LIBNBD_CMD_FLAG_FUA : 0);
}

void nbd_plan_zero(const struct nbd_disk *d, struct disk_io *io)
{
    bool quick = d->disk.host->now_ns - io->work.progress_ns < ZERO_QUICK_NS;
    uint64_t last = io->work.step_bytes;
    if (io->work.transferred == 0 || last < ZERO_STEP_BYTES)
        io->work.step_bytes = ZERO_STEP_BYTES;
    else if (quick && last <= RANGE_BYTES / 2)
        io->work.step_bytes = last * 2;
}

static uint64_t zero_part(const struct nbd_disk *d, const struct disk_io *io)
{
    uint64_t left = io->length - io->work.transferred, most = d->nbd->export.maximum_bytes;
    if (io->work.step == ZERO_FAST)
        return part_of(d, left, RANGE_BYTES);
    if (io->work.step == ZERO_COMMAND)
        return part_of(d, left, io->work.step_bytes);
    return part_of(d, left, most < sizeof zeroes ? most : sizeof zeroes);
}

static int64_t zero(struct nbd_disk *d, struct disk_io *io)
{
    struct nbd_handle *handle = next_handle(d);
    uint64_t at = io->offset + io->work.transferred;
    uint32_t flags = (io->work.durable ? LIBNBD_CMD_FLAG_FUA : 0) | (io->may_unmap ? 0 : LIBNBD_CMD_FLAG_NO_HOLE);
    nbd_completion_callback answer = {.callback = zeroed, .user_data = io};
    if (io->work.step == ZERO_FAST && (d->no_fast_zero || !d->nbd->export.can_fast_zero))
        io->work.step = ZERO_COMMAND;
    if (!d->nbd->export.can_zero)
        io->work.step = ZERO_WRITE;
    io->work.step_bytes = zero_part(d, io);
    if (io->work.step == ZERO_WRITE)
        return nbd_aio_pwrite(handle, zeroes, io->work.step_bytes, at, answer, flags & LIBNBD_CMD_FLAG_FUA);
    if (io->work.step == ZERO_FAST)
        flags |= LIBNBD_CMD_FLAG_FAST_ZERO;
    return nbd_aio_zero(handle, io->work.step_bytes, at, answer, flags);
}

static int64_t find_extents(struct nbd_disk *d, struct disk_io *io)
{
    uint64_t at = io->offset + io->work.transferred;
    nbd_extent_callback told = {.callback = extents_told, .user_data = io};
    nbd_completion_callback over = {.callback = extents_over, .user_data = io};
    io->data_at = io->data_end = at;
    return nbd_aio_block_status(next_handle(d), part_of(d, io->length - io->work.transferred, RANGE_BYTES), at, told,
                                over, 0);
}

static int64_t send_command(struct nbd_disk *d, struct disk_io *io)
{
    switch (io->kind) {
    case VS_DISK_READ:
    case VS_DISK_WRITE:
        return transfer(d, io);
    case VS_DISK_ZERO:
        return zero(d, io);
    case VS_DISK_EXTENTS:
        return find_extents(d, io);
    default:
        return nbd_aio_flush(next_handle(d), (nbd_completion_callback){.callback = flushed, .user_data = io}, 0);
    }
}

bool nbd_any_lost(const struct nbd_disk *d)
{
    for (uint32_t i = 0; i < d->nbd->connections; i++)
        if (nbd_is_lost(d->nbd->handle[i]))
            return true;
    return false;
}

void nbd_command(struct nbd_disk *d, struct disk_io *io)
{
    if (send_command(d, io) < 0) {
        int error = nbd_get_errno();
        nbd_fail(d, io, nbd_any_lost(d) ? -ENOTCONN : of_disk(error));
    }
}
