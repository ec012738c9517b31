/* SPDX-License-Identifier: Apache-2.0
 *
 * Every bound of the data plane, in one place. What the documents quote stands here.
 */
#ifndef VS_BOUNDS_H
#define VS_BOUNDS_H

#include <assert.h>
#include <linux/virtio_ring.h>

#include "shim.h"

/* Requests that are at work, over all queues: what would be one more stays in its ring. Those that wait for durability
 * do not count: a pause may hold whatever the rings hold, and reads are to go on. */
#define REQUESTS_MAX 1024
#define REQUEST_SLOTS (VS_MAX_QUEUES * VS_MAX_QUEUE_SIZE)
/* Segments of one request as the guest laid them out, plus those that a region
 * border cuts in two. */
#define REQUEST_IOV_MAX 160
/* Log room is given in units of a page, so that any disk's direct I/O can use it. */
#define LOG_UNIT_BYTES 4096u
/* Discards and write-zeroes take an entry and no room; they get this many beyond a page each. */
#define LOG_EXTRA_ENTRIES 1024u
/* Buffers for requests whose memory is not aligned as direct I/O needs it. */
#define BOUNCE_BYTES (2u * VS_REQUEST_BYTES_MAX)
/* Writes to the destination in flight, and what one merged write may hold. */
#define REPLICA_DEPTH 64
#define REPLICA_IOV_MAX 64
#define REPLICA_MERGE_BYTES (1u << 20)
/* The bulk copy: bytes of one region copy, and how many at most at once. */
#define COPY_BYTES (1u << 20)
#define COPY_DEPTH_MAX 16
/* While the guest works: one at a time, of this size (or of one region, if that is larger), so that its requests
 * never wait for more at the disk. Only at disks that take at least so long for one there is more, as long as the
 * copy's requests are not slowed by more than that (copy_pace.c). */
#define COPY_BESIDE_BYTES (128u << 10)
#define COPY_FAR_NS 1000000u
#define COPY_SLACK_NS 1000000u
/* It counts as at work for so long after each request. */
#define GUEST_WORKS_NS 100000000u
/* Where the source cannot be read, down to pieces of this size is tried what can. */
#define RESCUE_BYTES 4096u
/* Reads of the destination for the guest, where the source has failed, at once. */
#define FALLBACK_DEPTH 16
/* Zeroes are looked for, and skipped or punched, in units of this size. */
#define COPY_ZERO_BYTES (64u << 10)
/* A hole is passed over in steps of this size. */
#define COPY_HOLE_BYTES (1u << 30)
/* Verification: bytes of one comparison, and how many at most at once. */
#define VERIFY_BYTES (1u << 20)
#define VERIFY_DEPTH 4
/* A destination over a network that nothing was asked of for so long is asked for a block; and for the next one so much
 * later where it had an error there, for it does answer. */
#define IDLE_PROBE_NS 3000000000u
#define IDLE_PROBE_AFTER_ERROR_NS 60000000000u
/* Requests taken up in one pass: from one queue before the next one has its turn, and from all. With more, what was
 * captured has left the processor's cache before it is replicated. */
#define PASS_BUDGET 64
/* In pass-through, requests that have completed at once are shown to the guest in groups of this size. */
#define EARLY_NOTIFY 16
/* A disk that has nothing to do gets so many of a batch at once, and works while the others are made ready. */
#define EARLY_SUBMIT 8
#define EVENTS_MAX 2048
/* Worker threads of the kernel that the ring may have. */
#define URING_WORKERS 512
/* Both queues of a ring are charged to the user's RLIMIT_MEMLOCK (52 KiB of the usual 8 MiB, which all backends of one
 * user share), so they are no larger than they need to be. Entries: handed over at once; more take a second call. */
#define URING_ENTRIES 256
#define URING_CQ_ENTRIES 2048
/* An I/O thread: jobs on their way to it or back, and its own ring. */
#define IO_CHANNEL_JOBS 2048u
#define IO_THREAD_ENTRIES 256
#define IO_THREAD_CQ_ENTRIES 2048
/* Operations of all disks that can be in flight, with room for a few flushes. */
#define DISK_IO_MAX (REQUESTS_MAX + REPLICA_DEPTH + FALLBACK_DEPTH + COPY_DEPTH_MAX + 2 * VERIFY_DEPTH + 64)

static_assert(VS_MAX_QUEUE_SIZE <= 32768, "virtio: a split ring has at most 32768 descriptors");
static_assert((VS_MAX_QUEUE_SIZE & (VS_MAX_QUEUE_SIZE - 1)) == 0, "a split ring's size is a power of two");
static_assert(VS_SEGMENT_MAX + 2 <= REQUEST_IOV_MAX, "every legal request fits its iovec array");
static_assert((unsigned long)VS_SEGMENT_MAX * VS_SEGMENT_BYTES_MAX <= VS_REQUEST_BYTES_MAX,
              "every legal request is within the bound on its bytes");
static_assert(BOUNCE_BYTES >= VS_REQUEST_BYTES_MAX, "the largest request can be bounced");
static_assert(URING_WORKERS > REPLICA_DEPTH + FALLBACK_DEPTH + COPY_DEPTH_MAX + 2 * VERIFY_DEPTH + 4,
              "a destination that hangs leaves workers to the source");
static_assert(EVENTS_MAX >= 2 * VS_COMMANDS_MAX, "every command's completion has a place among the events");
static_assert(URING_CQ_ENTRIES >= DISK_IO_MAX + VS_MAX_QUEUES * VS_MAX_ATTACHMENTS,
              "what is in flight, and each queue's poll, has a place for a completion (the kernel keeps the rest)");
static_assert(IO_CHANNEL_JOBS > DISK_IO_MAX && (IO_CHANNEL_JOBS & (IO_CHANNEL_JOBS - 1)) == 0,
              "a channel has a place for every operation of the disks, and its indices may wrap");
static_assert(IO_THREAD_CQ_ENTRIES > DISK_IO_MAX, "all jobs of an I/O thread fit its completion queue");
static_assert(COPY_BESIDE_BYTES <= COPY_BYTES, "a part of the copy fits its buffer");
static_assert(COPY_BYTES % RESCUE_BYTES == 0 && RESCUE_BYTES % 4096 == 0, "a piece is whole blocks of any disk");
static_assert(sizeof(struct vring_desc) == 16, "virtio 1.x, 2.7.5");

#endif
