/* SPDX-License-Identifier: Apache-2.0
 *
 * What all kinds of disks have in common: the gate that every operation passes on its way in, the list of those that
 * are done, and the answers for what a kind leaves out. See disk.h.
 */
#include "disk.h"

#include <assert.h>
#include <errno.h>
#include <unistd.h>

void op_stats_add(struct vs_op_stats *s, uint64_t bytes, uint64_t latency_ns, bool failed)
{
    unsigned bucket = latency_ns ? 63u - (unsigned)__builtin_clzll(latency_ns) : 0;
    s->operations++;
    s->latency_ns_total += latency_ns;
    s->latency_ns_log2[bucket < VS_LATENCY_BUCKETS ? bucket : VS_LATENCY_BUCKETS - 1]++;
    if (failed)
        s->errors++;
    else
        s->bytes += bytes;
}

void disk_host_init(struct disk_host *host, struct uring *uring, int wake_fd)
{
    host->uring = uring;
    host->threads = (struct io_threads){.count = 1};
    host->now_ns = 0;
    host->changes = 0;
    host->wake_fd = wake_fd;
    list_init(&host->done);
    list_init(&host->remote);
    pthread_mutex_init(&host->lock, NULL);
}

void disk_host_free(struct disk_host *host)
{
    pthread_mutex_destroy(&host->lock);
}

void disk_init(struct vs_disk *disk, const struct disk_ops *ops, uint64_t bytes, uint32_t block_bytes,
               uint32_t memory_align_bytes, uint32_t can)
{
    disk->ops = ops;
    disk->bytes = bytes;
    disk->block_bytes = block_bytes;
    disk->memory_align_bytes = memory_align_bytes;
    disk->can = can;
    disk->flush_failed = false;
    disk->unanswered = false;
    disk->lost = false;
    disk->serves = false;
    disk->host = NULL;
    disk->stats = (struct vs_disk_stats){0};
    list_init(&disk->in_flight_list);
}

void disk_adopt(struct vs_disk *disk, struct disk_host *host)
{
    assert(list_empty(&disk->in_flight_list));
    disk->host = host;
    host->changes++; /* whoever opened it may have marked it */
}

void disk_close(struct vs_disk *disk)
{
    assert(disk->stats.in_flight == 0);
    disk->ops->close(disk);
}

void disk_close_later(struct vs_disk *disk, void (*over)(struct disk_io *closing), void *closing_for)
{
    assert(disk->stats.in_flight == 0);
    disk->closing_for = closing_for;
    disk->closing = (struct disk_io){.kind = VS_DISK_CLOSE, .done = over};
    disk_submit(disk, &disk->closing);
}

void disk_free(struct vs_disk *disk)
{
    assert(disk->stats.in_flight == 0);
    disk->ops->close(disk);
}

void vs_disk_close(vs_disk *disk)
{
    disk_close(disk);
}

void disk_serve(struct vs_disk *disk, bool serves)
{
    disk->serves = serves;
}

static bool changes(const struct disk_io *io)
{
    return io->kind == VS_DISK_WRITE || io->kind == VS_DISK_ZERO;
}

/* A flush that is carried out late does no harm. */
static bool may_land_late(const struct disk_io *io)
{
    return io->work.unanswered && changes(io);
}

/* A flush, too: on a network file system the server writes then, and gives the times. */
static void count_change(struct disk_host *host, const struct disk_io *io)
{
    if (io->kind != VS_DISK_READ && io->kind < VS_DISK_OPS)
        host->changes++;
}

static bool leaves_out(const struct vs_disk *disk, uint32_t kind)
{
    switch (kind) {
    case VS_DISK_EXTENTS:
        return !(disk->can & DISK_TELLS_EXTENTS);
    case VS_DISK_SIZE:
        return !(disk->can & DISK_TELLS_SIZE);
    case VS_DISK_CLOSE:
        return !(disk->can & DISK_CLOSES_LATER);
    default:
        return false;
    }
}

/* What the disk's kind leaves out. */
static void answer_for(const struct vs_disk *disk, struct disk_io *io)
{
    if (io->kind == VS_DISK_EXTENTS)
        disk_all_data(io);
    else if (io->kind == VS_DISK_SIZE)
        io->size_bytes = disk->bytes;
    disk_complete(io, 0);
}

void disk_submit(struct vs_disk *disk, struct disk_io *io)
{
    assert(io->kind < VS_DISK_KINDS);
    if (io->kind != VS_DISK_FLUSH && io->kind != VS_DISK_CLOSE && io->kind != VS_DISK_SIZE) {
        assert(io->length > 0 && io->offset <= disk->bytes && io->length <= disk->bytes - io->offset);
        assert(io->offset % disk->block_bytes == 0 && io->length % disk->block_bytes == 0);
    }
    if (io->kind == VS_DISK_READ || io->kind == VS_DISK_WRITE)
        assert(iov_bytes(io->iov, io->iov_count) == io->length &&
               (io->iov_count == 1 || !(disk->can & DISK_ONE_BUFFER)));
    assert(io->thread < disk->host->threads.count);
    io->work.disk = disk;
    io->result = 0;
    io->work.unanswered = false;
    io->work.transferred = 0;
    io->work.iov_taken = 0;
    io->work.step = 0;
    io->work.submitted_ns = io->work.progress_ns = disk->host->now_ns;
    list_append(&disk->in_flight_list, &io->work.link);
    disk->stats.in_flight++;
    count_change(disk->host, io);
    if (io->kind == VS_DISK_FLUSH && disk->flush_failed)
        disk_complete(io, -EIO);
    else if (leaves_out(disk, io->kind))
        answer_for(disk, io);
    else
        disk->ops->submit(disk, io);
}

bool disk_cut_off(struct vs_disk *disk)
{
    if (!(disk->can & DISK_CAN_BE_CUT_OFF))
        return false;
    disk->ops->cut_off(disk);
    return true;
}

void disk_complete(struct disk_io *io, int result)
{
    assert(result <= 0);
    io->result = result;
    list_remove(&io->work.link);
    list_append(&io->work.disk->host->done, &io->work.link);
}

void disk_progress(struct disk_io *io)
{
    io->work.progress_ns = io->work.disk->host->now_ns;
    list_remove(&io->work.link);
    list_append(&io->work.disk->in_flight_list, &io->work.link);
}

void disk_complete_remote(struct disk_io *io, int result)
{
    struct list alone;
    list_init(&alone);
    io->result = result;
    list_append(&alone, &io->work.remote_link);
    disk_complete_remote_all(io->work.disk->host, &alone);
}

void disk_complete_remote_all(struct disk_host *host, struct list *ios)
{
    uint64_t one = 1;
    bool first;
    pthread_mutex_lock(&host->lock);
    first = list_empty(&host->remote);
    list_splice(&host->remote, ios);
    /* Under the lock: once the engine has seen one, it may end and take host with it. */
    if (first && write(host->wake_fd, &one, sizeof one) < 0)
        assert(errno == EAGAIN || errno == EINTR); /* the counter is full: it wakes anyway */
    pthread_mutex_unlock(&host->lock);
}

/* Where a hole is wrongly believed the destination lacks data. So an answer that cannot be is none: of a kind that has
 * failed to find out, too, for io was used before. */
static void check_extents(struct disk_io *io)
{
    uint64_t end = io->offset + io->length;
    bool hole_first = io->data_at == end || (io->data_at >= io->offset && io->data_at < io->data_end);
    if (io->result < 0 || !hole_first || io->data_end > end)
        disk_all_data(io);
    io->result = 0;
}

static void note_failure(struct vs_disk *disk, const struct disk_io *io)
{
    if (io->kind == VS_DISK_FLUSH && disk->can & DISK_FORGETS_FAILED_FLUSH)
        disk->flush_failed = true;
    disk->unanswered |= may_land_late(io);
}

static void finish_io(struct disk_io *io)
{
    struct vs_disk *disk = io->work.disk;
    assert(disk->stats.in_flight > 0);
    disk->stats.in_flight--;
    count_change(disk->host, io);
    if (io->kind < VS_DISK_OPS)
        op_stats_add(&disk->stats.op[io->kind], io->kind == VS_DISK_FLUSH ? 0 : io->length,
                     disk_io_age_ns(io, disk->host->now_ns), io->result < 0);
    else if (io->kind == VS_DISK_EXTENTS)
        check_extents(io);
    if (io->result < 0)
        note_failure(disk, io);
    disk_io_restore(io);
    io->done(io); /* the last thing: the disk may be gone after that */
}

/* The disk has it before the progress is noted, and so can see how long the last part took. */
static void go_on(struct disk_io *io)
{
    io->result = 0;
    io->work.disk->ops->submit(io->work.disk, io);
    disk_progress(io);
}

unsigned disk_run_done(struct disk_host *host)
{
    unsigned count = 0;
    struct list *node, remote;
    list_init(&remote);
    pthread_mutex_lock(&host->lock);
    list_splice(&remote, &host->remote);
    pthread_mutex_unlock(&host->lock);
    while ((node = list_pop(&remote))) {
        struct disk_io *io = container_of(node, struct disk_io, work.remote_link);
        if (io->result == DISK_GO_ON)
            go_on(io);
        else
            disk_complete(io, io->result);
    }
    while ((node = list_pop(&host->done))) {
        finish_io(container_of(node, struct disk_io, work.link));
        count++;
    }
    return count;
}

bool disk_iov_aligned(const struct vs_disk *disk, const struct iovec *iov, int count)
{
    uint64_t addresses = 0, lengths = 0;
    if (count > 1 && disk->can & DISK_ONE_BUFFER)
        return false;
    if (disk->memory_align_bytes <= 1)
        return true;
    for (int i = 0; i < count; i++) {
        addresses |= (uintptr_t)iov[i].iov_base;
        lengths |= iov[i].iov_len;
    }
    /* Direct I/O takes each segment for itself, so its length is a number of blocks. */
    return (addresses & (disk->memory_align_bytes - 1)) == 0 && (lengths & (disk->block_bytes - 1)) == 0;
}

void disk_all_data(struct disk_io *io)
{
    io->data_at = io->offset;
    io->data_end = io->offset + io->length;
}

bool disk_found_hole(const struct disk_io *io)
{
    return io->data_at == io->offset + io->length;
}

uint64_t disk_oldest_ns(const struct vs_disk *disk)
{
    /* In that order, so the head of the list is the oldest. */
    if (list_empty(&disk->in_flight_list))
        return UINT64_MAX;
    return container_of(disk->in_flight_list.next, struct disk_io, work.link)->work.progress_ns;
}

void disk_io_restore(struct disk_io *io)
{
    if (!io->work.iov_taken)
        return;
    io->iov->iov_base = (char *)io->iov->iov_base - io->work.iov_taken;
    io->iov->iov_len += io->work.iov_taken;
    io->work.iov_taken = 0;
}

void disk_io_advance(struct disk_io *io, uint64_t bytes)
{
    bytes += io->work.iov_taken;
    disk_io_restore(io);
    while (io->iov_count > 0 && bytes >= io->iov->iov_len) {
        bytes -= io->iov->iov_len;
        io->iov++;
        io->iov_count--;
    }
    if (io->iov_count > 0) {
        io->iov->iov_base = (char *)io->iov->iov_base + bytes;
        io->iov->iov_len -= bytes;
        io->work.iov_taken = bytes;
    }
}

uint64_t iov_bytes(const struct iovec *iov, int count)
{
    uint64_t sum = 0;
    for (int i = 0; i < count; i++)
        sum += iov[i].iov_len;
    return sum;
}
