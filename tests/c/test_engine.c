/* SPDX-License-Identifier: Apache-2.0
 *
 * The whole engine through shim_api.h: one driver, one request at a time, what
 * is required of the device, of the source's failures and of an attachment's
 * ends. The mirror is in test_engine_mirror.c, the load in test_engine_threads.c.
 */
#include "rig.h"

#define SECTORS (DISK_BYTES / 512)

/* ---- the device --------------------------------------------------------------- */

static void requests(uint64_t features)
{
    struct rig r = rig_begin(1, features);
    struct lane *l = &r.lane[0];
    CHECK_EQUAL(lane_fill(l, 8, 4096, 0x11), VIRTIO_BLK_S_OK);
    CHECK(disk_holds(r.source, 8, 4096, 0x11, CUT_NONE));
    memset(lane_data(l, 0), 0, 8192);
    CHECK_EQUAL(lane_do(l, VIRTIO_BLK_T_IN, 8, 8192), VIRTIO_BLK_S_OK);
    CHECK(lane_data(l, 0)[0] == 0x11 && lane_data(l, 0)[4095] == 0x11 && lane_data(l, 0)[4096] == 0);
    CHECK(disk_holds(r.source, 8, 4096, 0, CUT_ALL));
    CHECK_EQUAL(lane_flush(l), VIRTIO_BLK_S_OK);
    CHECK(disk_holds(r.source, 8, 4096, 0x11, CUT_ALL));
    CHECK_EQUAL(lane_do(l, VIRTIO_BLK_T_GET_ID, 0, 20), VIRTIO_BLK_S_OK);
    CHECK(memcmp(lane_data(l, 0), "rig\0\0", 5) == 0);
    struct virtio_blk_discard_write_zeroes range = {.sector = 9, .num_sectors = 2};
    memcpy(lane_data(l, 0), &range, sizeof range);
    CHECK_EQUAL(lane_do(l, VIRTIO_BLK_T_WRITE_ZEROES, 0, sizeof range), VIRTIO_BLK_S_OK);
    CHECK(disk_holds(r.source, 8, 512, 0x11, CUT_NONE) && disk_holds(r.source, 9, 1024, 0, CUT_NONE));
    range.sector = 12;
    memcpy(lane_data(l, 0), &range, sizeof range);
    CHECK_EQUAL(lane_do(l, VIRTIO_BLK_T_DISCARD, 0, sizeof range), VIRTIO_BLK_S_OK);
    CHECK(disk_holds(r.source, 11, 512, 0x11, CUT_NONE) && disk_holds(r.source, 12, 1024, 0, CUT_NONE));
    CHECK_EQUAL(lane_fill(l, SECTORS - 1, 512, 1), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(lane_fill(l, SECTORS - 1, 1024, 1), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(lane_fill(l, 0, 100, 1), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(lane_do(l, 77, 0, 512), VIRTIO_BLK_S_UNSUPP);
    struct vs_queue_stats q;
    struct vs_snapshot s = rig_snapshot(&r);
    vs_engine_queue_stats(r.engine, 0, &q);
    CHECK_EQUAL(q.malformed, 3);
    CHECK_EQUAL(q.op[VS_OP_FLUSH].operations, 1);
    CHECK_EQUAL(q.op[VS_OP_READ].bytes, 8192);
    CHECK_EQUAL(s.counts.source_generation, 4);
    CHECK_EQUAL(s.counts.source_flushed, 1);
    rig_end(&r);
}

static void the_device(void)
{
    requests(F_USUAL);
    requests(F_USUAL | F_EVENT_IDX);
    requests(F_USUAL | F_INDIRECT);
    requests(F_USUAL | F_INDIRECT | F_EVENT_IDX);
}

/* Neither FLUSH nor CONFIG_WCE: every write is durable when it is confirmed. */
static void write_through(void)
{
    struct rig r = rig_begin(1, F_VERSION_1);
    CHECK_EQUAL(lane_fill(&r.lane[0], 8, 4096, 0x11), VIRTIO_BLK_S_OK);
    CHECK(disk_holds(r.source, 8, 4096, 0x11, CUT_ALL));
    rig_mirror(&r);
    CHECK_EQUAL(lane_fill(&r.lane[0], 8, 4096, 0x22), VIRTIO_BLK_S_OK);
    CHECK(disk_holds(r.source, 8, 4096, 0x22, CUT_ALL) && disk_holds(r.destination, 8, 4096, 0x22, CUT_ALL));
    rig_end(&r);
    r = rig_begin(1, F_USUAL);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_SET_WRITE_CACHE, 0), 0);
    CHECK_EQUAL(lane_fill(&r.lane[0], 8, 4096, 0x33), VIRTIO_BLK_S_OK);
    CHECK(disk_holds(r.source, 8, 4096, 0x33, CUT_ALL));
    rig_end(&r);
}

/* Buffers that no direct I/O would take. */
static void unaligned_buffers(void)
{
    struct rig r = rig_begin(1, F_USUAL);
    struct lane *l = &r.lane[0];
    for (int mirrored = 0; mirrored < 2; mirrored++) {
        memset(lane_data(l, 0), 0x40 + mirrored, 8192);
        lane_send(l, 0, VIRTIO_BLK_T_OUT, 0, 4096);
        lane_quiet(l);
        l->ring.desc[1].addr += 3;
        for (uint32_t type = VIRTIO_BLK_T_OUT + 1; type-- > VIRTIO_BLK_T_IN;) {
            memset(lane_data(l, 0), type ? 0x50 + mirrored : 0, 8192);
            struct virtio_blk_outhdr header = {.type = type, .sector = 16};
            memcpy(lane_header(l, 0), &header, sizeof header);
            l->ring.desc[1].flags = VRING_DESC_F_NEXT | (type ? 0 : VRING_DESC_F_WRITE);
            ring_put(&l->ring, 0);
            l->in_flight++;
            ring_publish(&l->ring);
            lane_kick(l);
            CHECK_EQUAL(lane_wait(l), 0);
            CHECK_EQUAL(lane_status(l, 0), VIRTIO_BLK_S_OK);
        }
        CHECK(disk_holds(r.source, 16, 4096, (uint8_t)(0x50 + mirrored), CUT_NONE));
        CHECK(lane_data(l, 0)[2] == 0 && lane_data(l, 0)[3] == 0x50 + mirrored);
        CHECK(lane_data(l, 0)[4098] == 0x50 + mirrored && lane_data(l, 0)[4099] == 0);
        if (!mirrored)
            rig_mirror(&r);
    }
    rig_end(&r);
}

static void rubbish_breaks_one_ring(void)
{
    struct rig r = rig_begin(2, F_USUAL);
    struct lane *l = &r.lane[0];
    ring_desc(&l->ring.desc[0], GUEST_ADDR, 16, VRING_DESC_F_NEXT, 0);
    ring_put(&l->ring, 0);
    ring_publish(&l->ring);
    lane_kick(l);
    rig_wait_seen(&r, VS_EV_QUEUE_BROKEN, 1);
    CHECK_EQUAL(r.last[VS_EV_QUEUE_BROKEN].queue, 0);
    CHECK_EQUAL(r.last[VS_EV_QUEUE_BROKEN].reason, VS_BREACH_CHAIN);
    CHECK_EQUAL(lane_fill(&r.lane[1], 8, 4096, 1), VIRTIO_BLK_S_OK);
    /* Set up anew, it works. */
    CHECK_EQUAL(rig_vring(&r, VS_CMD_VRING_STOP, 0, 0, -1), 0);
    l->ring.published = l->ring.reaped = l->ring.used->idx = l->ring.avail->idx = 7;
    lane_setup(&r, 0, 7);
    CHECK_EQUAL(lane_fill(l, 8, 4096, 2), VIRTIO_BLK_S_OK);
    rig_end(&r);
}

static void source_faults(void)
{
    struct rig r = rig_begin(1, F_USUAL);
    struct lane *l = &r.lane[0];
    rig_mirror(&r);
    CHECK_EQUAL(lane_fill(l, 0, 8192, 1), VIRTIO_BLK_S_OK);
    vs_test_disk_fault(r.source, VS_DISK_READ, EIO, 0, 1);
    CHECK_EQUAL(lane_do(l, VIRTIO_BLK_T_IN, 0, 4096), VIRTIO_BLK_S_IOERR);
    vs_test_disk_fault(r.source, VS_DISK_FLUSH, EIO, 0, -1); /* before the write: a checkpoint may flush for it */
    CHECK_EQUAL(lane_fill(l, 0, 8192, 1), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(lane_flush(l), VIRTIO_BLK_S_IOERR);
    vs_test_disk_fault(r.source, VS_DISK_FLUSH, 0, 0, 0);
    vs_test_disk_fault(r.source, VS_DISK_WRITE, 0, 0, 3); /* short, and continued */
    CHECK_EQUAL(lane_fill(l, 0, 8192, 2), VIRTIO_BLK_S_OK);
    CHECK(disk_holds(r.source, 0, 8192, 2, CUT_NONE));
    vs_test_disk_fault(r.source, VS_DISK_WRITE, ENOSPC, 0, 1);
    CHECK_EQUAL(lane_fill(l, 0, 4096, 3), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_MIRROR_DRAIN, 1), 0);
    struct vs_snapshot s = rig_snapshot(&r);
    CHECK_EQUAL(s.mirror_state, VS_STEADY);
    CHECK_EQUAL(s.doubt_count, 1); /* and no switch while it is there */
    CHECK(s.doubt[0].offset == 0 && s.doubt[0].length == 4096);
    CHECK(disk_holds(r.destination, 0, 8192, 2, CUT_ALL));
    CHECK_EQUAL(rig_simple(&r, VS_CMD_GATE, UNHURRIED_US), 0);
    CHECK_EQUAL(rig_exchange(&r, 0), -EBUSY);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_UNGATE, 0), 0);
    CHECK_EQUAL(lane_fill(l, 0, 4096, 4), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(rig_snapshot(&r).doubt_count, 0);
    CHECK(r.seen[VS_EV_IO_ERROR] >= 3); /* more where a checkpoint's flush has failed too */
    rig_end(&r);
}

/* ---- stopping, memory, ends ------------------------------------------------------------ */

static void stop_and_resume(void)
{
    struct rig r = rig_begin(1, F_USUAL);
    struct lane *l = &r.lane[0];
    vs_test_disk_hold(r.source, VS_DISK_WRITE, 1);
    for (unsigned slot = 0; slot < 8; slot++)
        lane_send(l, slot, VIRTIO_BLK_T_OUT, 8 * slot, 4096);
    while (vs_test_disk_held(r.source, VS_DISK_WRITE) < 8)
        rig_snapshot(&r);
    uint64_t token = rig_submit(&r, &(struct vs_command){.kind = VS_CMD_VRING_STOP, .fd = -1});
    rig_snapshot(&r);
    lane_send(l, 8, VIRTIO_BLK_T_OUT, 64, 4096); /* stays in the ring */
    lane_kick(l);
    vs_test_disk_hold(r.source, VS_DISK_WRITE, 0);
    vs_test_disk_release(r.source, VS_DISK_WRITE, 100);
    struct vs_event done = rig_wait(&r, token);
    CHECK_EQUAL(done.result, 0);
    CHECK_EQUAL(done.value, (uint16_t)(l->ring.published - 1));
    for (int i = 0; i < 8; i++)
        CHECK(lane_poll(l) >= 0); /* all drained before the answer */
    CHECK_EQUAL(lane_poll(l), -1);
    lane_setup(&r, 0, (uint16_t)done.value);
    CHECK_EQUAL(lane_wait(l), 8);
    /* A disabled ring is quiet, and goes on when it is enabled. */
    CHECK_EQUAL(rig_vring(&r, VS_CMD_VRING_ENABLE, 0, 0, -1), 0);
    lane_send(l, 0, VIRTIO_BLK_T_IN, 0, 4096);
    lane_kick(l);
    rig_snapshot(&r);
    CHECK_EQUAL(lane_poll(l), -1);
    CHECK_EQUAL(rig_vring(&r, VS_CMD_VRING_ENABLE, 0, 1, -1), 0);
    CHECK_EQUAL(lane_wait(l), 0);
    rig_end(&r);
}

/* A ring that has to be quiet soon does not wait for a destination that hangs. */
static void a_stop_does_not_wait_for_the_destination(void)
{
    struct vs_engine_config config = rig_config();
    config.stop_timeout_us = 50000;
    struct rig r = rig_make(&config, rig_test_disk());
    rig_attach(&r, 1, F_USUAL);
    rig_mirror(&r);
    vs_test_disk_hold(r.destination, VS_DISK_WRITE, 1);
    CHECK_EQUAL(lane_fill(&r.lane[0], 8, 4096, 1), VIRTIO_BLK_S_OK);
    lane_send(&r.lane[0], 0, VIRTIO_BLK_T_FLUSH, 0, 0);
    while (rig_snapshot(&r).requests_waiting == 0)
        ;
    uint64_t token = rig_submit(&r, &(struct vs_command){.kind = VS_CMD_VRING_STOP, .fd = -1});
    rig_wait_seen(&r, VS_EV_DEGRADED, 1);
    CHECK_EQUAL(r.last[VS_EV_DEGRADED].reason, VS_REASON_STOP_TIMEOUT);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_RECORD_WRITTEN, 0), 0);
    CHECK_EQUAL(rig_wait(&r, token).result, 0);
    CHECK_EQUAL(lane_poll(&r.lane[0]), 0);
    vs_test_disk_release(r.destination, VS_DISK_WRITE, 100);
    rig_end(&r);
}

static void memory_comes_and_goes(void)
{
    struct rig r = rig_begin(1, F_USUAL);
    struct lane *l = &r.lane[0];
    struct guest more = guest_make(1 << 16);
    struct vs_command add = {.kind = VS_CMD_ADD_MEM_REGION, .fd = -1, .memory.count = 1};
    add.memory.region[0] = guest_region(&more, 0, more.bytes);
    add.memory.region[0].guest_addr = 1ull << 40;
    add.memory.region[0].user_addr = 1ull << 41;
    CHECK_EQUAL(rig_command(&r, add), 0);
    vs_test_disk_hold(r.source, VS_DISK_READ, 1);
    lane_send(l, 0, VIRTIO_BLK_T_IN, 0, 4096); /* lays out the chain; its data is put elsewhere */
    while (vs_test_disk_held(r.source, VS_DISK_READ) == 0)
        rig_snapshot(&r);
    vs_test_disk_release(r.source, VS_DISK_READ, 1);
    CHECK_EQUAL(lane_wait(l), 0);
    CHECK_EQUAL(vs_test_disk_load(r.source, 0, 4096, memset(lane_data(l, 1), 9, 4096)), 0);
    l->ring.desc[1].addr = 1ull << 40;
    ring_put(&l->ring, 0);
    l->in_flight++;
    ring_publish(&l->ring);
    lane_kick(l);
    while (vs_test_disk_held(r.source, VS_DISK_READ) == 0)
        rig_snapshot(&r);
    struct vs_command removal = add;
    removal.kind = VS_CMD_REMOVE_MEM_REGION;
    removal.memory.region[0].fd = -1;
    uint64_t token = rig_submit(&r, &removal);
    rig_snapshot(&r);
    CHECK_EQUAL(r.last[VS_EV_DONE].token != token, true); /* a request has it in hand */
    vs_test_disk_hold(r.source, VS_DISK_READ, 0);
    vs_test_disk_release(r.source, VS_DISK_READ, 1);
    CHECK_EQUAL(rig_wait(&r, token).result, 0);
    CHECK_EQUAL(lane_wait(l), 0);
    CHECK(more.base[0] == 9 && more.base[4095] == 9);
    /* Now that address is nobody's. */
    ring_put(&l->ring, 0);
    l->in_flight++;
    ring_publish(&l->ring);
    lane_kick(l);
    CHECK_EQUAL(lane_wait(l), 0);
    CHECK_EQUAL(lane_status(l, 0), VIRTIO_BLK_S_IOERR);
    guest_end(&more);
    rig_end(&r);
}

/* The frontend shrinks the memory under the rings: its attachment is lost, the next one works. */
static void lost_memory(void)
{
    struct rig r = rig_begin(1, F_USUAL);
    CHECK_EQUAL(lane_fill(&r.lane[0], 0, 4096, 1), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(ftruncate(r.guest->fd, 0), 0);
    lane_kick(&r.lane[0]);
    rig_wait_seen(&r, VS_EV_ATTACHMENT_LOST, 1);
    CHECK_EQUAL(r.last[VS_EV_ATTACHMENT_LOST].attachment, 0);
    rig_detach(&r);
    rig_attach(&r, 1, F_USUAL);
    CHECK_EQUAL(lane_fill(&r.lane[0], 0, 4096, 2), VIRTIO_BLK_S_OK);
    rig_end(&r);
}

/* Several negotiate, one runs. */
static void two_attachments(void)
{
    struct rig r = rig_begin(1, F_USUAL);
    struct rig second = r;
    second.attachment = 1;
    rig_attach(&second, 1, F_USUAL);
    CHECK_EQUAL(lane_fill(&r.lane[0], 0, 4096, 1), VIRTIO_BLK_S_OK);
    lane_send(&second.lane[0], 0, VIRTIO_BLK_T_IN, 0, 4096);
    lane_kick(&second.lane[0]);
    CHECK_EQUAL(rig_snapshot(&r).active_attachment, 0);
    CHECK_EQUAL(lane_poll(&second.lane[0]), -1);
    CHECK_EQUAL(rig_vring(&r, VS_CMD_VRING_STOP, 0, 0, -1), 0);
    CHECK_EQUAL(lane_wait(&second.lane[0]), 0);
    CHECK_EQUAL(lane_data(&second.lane[0], 0)[0], 1);
    CHECK_EQUAL(rig_snapshot(&r).active_attachment, 1);
    rig_detach(&second);
    rig_end(&r);
}

/* A frontend that goes while its requests are at the disk. */
static void detached_with_requests(void)
{
    struct rig r = rig_begin(1, F_USUAL);
    struct lane *l = &r.lane[0];
    rig_mirror(&r);
    vs_test_disk_hold(r.source, VS_DISK_WRITE, 1);
    for (unsigned slot = 0; slot < 8; slot++) /* all the same range: one at the disk, the rest wait their turn */
        lane_send(l, slot, VIRTIO_BLK_T_OUT, 0, 4096);
    while (vs_test_disk_held(r.source, VS_DISK_WRITE) == 0)
        rig_snapshot(&r);
    uint64_t token = rig_submit(&r, &(struct vs_command){.kind = VS_CMD_DETACH, .fd = -1});
    rig_snapshot(&r);
    CHECK(r.last[VS_EV_DONE].token != token);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_SET_FEATURES, 0), -EINVAL); /* it is closing */
    vs_test_disk_hold(r.source, VS_DISK_WRITE, 0);
    vs_test_disk_release(r.source, VS_DISK_WRITE, 100);
    CHECK_EQUAL(rig_wait(&r, token).result, 0);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_MIRROR_DRAIN, 1), 0);
    CHECK(disks_equal(r.source, r.destination, CUT_ALL));
    rig_forget_guest(&r);
    rig_attach(&r, 2, F_USUAL); /* the next one finds a working device */
    CHECK_EQUAL(lane_fill(&r.lane[1], 0, 4096, 5), VIRTIO_BLK_S_OK);
    rig_end(&r);
}

/* The engine ends although a guest is attached and waits for a flush that nobody will decide. */
static void destroyed_with_waiting_requests(void)
{
    struct rig r = rig_begin(1, F_USUAL);
    rig_mirror(&r);
    vs_test_disk_hold(r.destination, VS_DISK_WRITE, 1);
    CHECK_EQUAL(lane_fill(&r.lane[0], 8, 4096, 1), VIRTIO_BLK_S_OK);
    lane_send(&r.lane[0], 0, VIRTIO_BLK_T_FLUSH, 0, 0);
    rig_submit(&r, &(struct vs_command){.kind = VS_CMD_MIRROR_DRAIN, .fd = -1, .value = 1}); /* waits too */
    while (rig_snapshot(&r).requests_waiting < 2)
        ;
    vs_test_disk_fault(r.destination, VS_DISK_WRITE, EIO, 0, -1);
    vs_test_disk_hold(r.destination, VS_DISK_WRITE, 0);
    vs_test_disk_release(r.destination, VS_DISK_WRITE, 1);
    rig_wait_seen(&r, VS_EV_DEGRADED, 1);
    vs_engine_destroy(r.engine);
    CHECK_EQUAL(lane_poll(&r.lane[0]), -1); /* nothing was confirmed */
    rig_forget_guest(&r);
    vs_test_disk_drop(r.source);
    vs_test_disk_drop(r.destination);
}

static void bad_commands(void)
{
    struct rig r = rig_begin(1, F_USUAL);
    CHECK_EQUAL(rig_simple(&r, 0, 0), -EINVAL);
    CHECK_EQUAL(rig_simple(&r, 999, 0), -EINVAL);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_ATTACH, 0), -EBUSY);
    CHECK_EQUAL(rig_vring(&r, VS_CMD_VRING_NUM, VS_MAX_QUEUES, 64, -1), -EINVAL);
    CHECK_EQUAL(rig_vring(&r, VS_CMD_VRING_NUM, 3, 63, -1), -EINVAL);
    CHECK_EQUAL(rig_vring(&r, VS_CMD_VRING_NUM, 3, 0, -1), -EINVAL);
    CHECK_EQUAL(rig_vring(&r, VS_CMD_VRING_NUM, 3, 2 * VS_MAX_QUEUE_SIZE, -1), -EINVAL);
    CHECK_EQUAL(rig_vring(&r, VS_CMD_VRING_BASE, 3, 65536, -1), -EINVAL);
    CHECK_EQUAL(rig_vring(&r, VS_CMD_VRING_KICK, 3, 0, -1), -EINVAL);
    r.attachment = VS_MAX_ATTACHMENTS;
    CHECK_EQUAL(rig_simple(&r, VS_CMD_ATTACH, 0), -EINVAL);
    CHECK_EQUAL(rig_vring(&r, VS_CMD_VRING_KICK, 0, 0, eventfd(0, 0)), -EINVAL);
    r.attachment = 1; /* not attached */
    CHECK_EQUAL(rig_vring(&r, VS_CMD_VRING_KICK, 0, 0, eventfd(0, 0)), -EINVAL);
    r.attachment = 0;
    CHECK_EQUAL(lane_fill(&r.lane[0], 0, 4096, 1), VIRTIO_BLK_S_OK);
    rig_end(&r);
}

int main(void)
{
    test("the device", the_device);
    test("write-through", write_through);
    test("unaligned buffers", unaligned_buffers);
    test("rubbish breaks one ring", rubbish_breaks_one_ring);
    test("source faults", source_faults);
    test("stop and resume", stop_and_resume);
    test("a stop does not wait for the destination", a_stop_does_not_wait_for_the_destination);
    test("memory comes and goes", memory_comes_and_goes);
    test("lost memory", lost_memory);
    test("two attachments", two_attachments);
    test("detached with requests", detached_with_requests);
    test("bad commands", bad_commands);
    test("destroyed with waiting requests", destroyed_with_waiting_requests);
    return tests_end();
}
