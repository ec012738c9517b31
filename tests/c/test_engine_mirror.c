/* SPDX-License-Identifier: Apache-2.0
 *
 * The mirror and the switch through shim_api.h: one driver, one request at a
 * time, what is required in each state and of each failure.
 */
#include "rig.h"

/* ---- the mirror ------------------------------------------------------------------ */

static void copy_and_steady(void)
{
    struct rig r = rig_begin(1, F_USUAL);
    struct lane *l = &r.lane[0];
    static uint8_t content[DISK_BYTES];
    uint64_t state = 9;
    for (uint64_t i = 0; i < DISK_BYTES; i++)
        content[i] = (i >> 18) % 3 == 1 ? 0 : (uint8_t)test_random(&state);
    CHECK_EQUAL(vs_test_disk_load(r.source, 0, DISK_BYTES, content), 0);
    rig_mirror(&r);
    CHECK(disks_equal(r.source, r.destination, CUT_ALL));
    struct vs_snapshot s = rig_snapshot(&r);
    CHECK(s.counts.mirrored_known);
    CHECK_EQUAL(s.copy_bytes_done, DISK_BYTES);
    CHECK_EQUAL(s.copy_bytes_total, DISK_BYTES);
    CHECK(s.copy_bytes_sparse > DISK_BYTES / 4);
    CHECK_EQUAL(lane_fill(l, 100, 4096, 0x77), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(lane_flush(l), VIRTIO_BLK_S_OK);
    CHECK(disk_holds(r.destination, 100, 4096, 0x77, CUT_ALL));
    CHECK(disks_equal(r.source, r.destination, CUT_ALL));
    s = rig_snapshot(&r);
    CHECK_EQUAL(s.counts.source_generation, 1);
    CHECK_EQUAL(s.counts.writes_mirrored, 1);
    CHECK_EQUAL(s.counts.writes_flushed, 1);
    CHECK_EQUAL(s.counts.flush_request, 1);
    rig_end(&r);
}

/* No disk is flushed but for the guest, however slow the machine is. */
static struct rig begin_without_checkpoints(unsigned queues)
{
    uint64_t usual_us = rig_checkpoint_us;
    rig_checkpoint_us = 600000000;
    struct rig r = rig_begin(queues, F_USUAL);
    rig_checkpoint_us = usual_us;
    return r;
}

/* The guest's flush is not confirmed before the destination's, and needs none where R <= F. */
static void count_check(void)
{
    struct rig r = begin_without_checkpoints(2);
    struct lane *l = &r.lane[0];
    rig_mirror(&r);
    uint64_t flushes = vs_test_disk_count(r.destination, VS_DISK_FLUSH);
    CHECK_EQUAL(lane_flush(l), VIRTIO_BLK_S_OK); /* R = F = 0 */
    CHECK_EQUAL(vs_test_disk_count(r.destination, VS_DISK_FLUSH), flushes);
    CHECK_EQUAL(lane_fill(l, 8, 4096, 1), VIRTIO_BLK_S_OK);
    vs_test_disk_hold(r.destination, VS_DISK_FLUSH, 1);
    lane_send(l, 0, VIRTIO_BLK_T_FLUSH, 0, 0);
    while (vs_test_disk_held(r.destination, VS_DISK_FLUSH) == 0)
        rig_snapshot(&r);
    CHECK_EQUAL(lane_fill(&r.lane[1], 64, 4096, 2), VIRTIO_BLK_S_OK); /* writes go on meanwhile */
    CHECK_EQUAL(lane_poll(l), -1);
    CHECK_EQUAL(rig_snapshot(&r).requests_waiting, 1);
    vs_test_disk_hold(r.destination, VS_DISK_FLUSH, 0);
    CHECK_EQUAL(vs_test_disk_release(r.destination, VS_DISK_FLUSH, 100), 1);
    CHECK_EQUAL(lane_wait(l), 0);
    CHECK_EQUAL(lane_status(l, 0), VIRTIO_BLK_S_OK);
    CHECK(disk_holds(r.destination, 8, 4096, 1, CUT_ALL));
    struct vs_snapshot s = rig_snapshot(&r);
    CHECK_EQUAL(s.counts.writes_flushed, 1); /* M as it was when that flush began */
    /* Row three: replication is behind. */
    vs_test_disk_hold(r.destination, VS_DISK_WRITE, 1);
    CHECK_EQUAL(lane_fill(l, 8, 4096, 3), VIRTIO_BLK_S_OK);
    lane_send(l, 0, VIRTIO_BLK_T_FLUSH, 0, 0);
    while (vs_test_disk_held(r.destination, VS_DISK_WRITE) == 0)
        rig_snapshot(&r);
    CHECK_EQUAL(rig_snapshot(&r).lag_writes, 1);
    CHECK_EQUAL(lane_poll(l), -1);
    vs_test_disk_hold(r.destination, VS_DISK_WRITE, 0);
    CHECK_EQUAL(vs_test_disk_release(r.destination, VS_DISK_WRITE, 100), 1);
    CHECK_EQUAL(lane_wait(l), 0);
    CHECK(disk_holds(r.destination, 8, 4096, 3, CUT_ALL));
    rig_end(&r);
}

/* A guest that scribbles on its buffer while the source has the write: both disks hold the same. */
static void the_same_bytes(void)
{
    struct rig r = rig_begin(1, F_USUAL);
    struct lane *l = &r.lane[0];
    rig_mirror(&r);
    vs_test_disk_hold(r.source, VS_DISK_WRITE, 1);
    memset(lane_data(l, 0), 1, 4096);
    lane_send(l, 0, VIRTIO_BLK_T_OUT, 0, 4096);
    while (vs_test_disk_held(r.source, VS_DISK_WRITE) == 0)
        rig_snapshot(&r);
    memset(lane_data(l, 0), 2, 4096);
    vs_test_disk_hold(r.source, VS_DISK_WRITE, 0);
    vs_test_disk_release(r.source, VS_DISK_WRITE, 1);
    CHECK_EQUAL(lane_wait(l), 0);
    memset(lane_data(l, 0), 3, 4096);
    CHECK_EQUAL(lane_flush(l), VIRTIO_BLK_S_OK);
    CHECK(disk_holds(r.source, 0, 4096, 1, CUT_ALL) && disk_holds(r.destination, 0, 4096, 1, CUT_ALL));
    rig_end(&r);
}

static void destination_fails(uint32_t op)
{
    struct rig r = rig_begin(1, F_USUAL);
    struct lane *l = &r.lane[0];
    rig_mirror(&r);
    vs_test_disk_fault(r.destination, op, EIO, 0, -1);
    CHECK_EQUAL(lane_fill(l, 8, 4096, 1), VIRTIO_BLK_S_OK);
    lane_send(l, 0, VIRTIO_BLK_T_FLUSH, 0, 0);
    rig_wait_seen(&r, VS_EV_DEGRADED, 1);
    CHECK_EQUAL(r.state, VS_DEGRADED);
    struct vs_snapshot s = rig_snapshot(&r);
    CHECK(s.record_pending && !s.counts.mirrored_known);
    CHECK_EQUAL(lane_poll(l), -1); /* not before the state record says so */
    CHECK_EQUAL(rig_simple(&r, VS_CMD_RECORD_WRITTEN, 0), 0);
    CHECK_EQUAL(lane_wait(l), 0);
    CHECK_EQUAL(lane_status(l, 0), VIRTIO_BLK_S_OK);
    CHECK(disk_holds(r.source, 8, 4096, 1, CUT_ALL));
    rig_wait_seen(&r, VS_EV_FENCE_CLEAR, 1);
    /* A new one may be attached. */
    vs_test_disk_drop(r.destination);
    rig_mirror(&r);
    CHECK(disks_equal(r.source, r.destination, CUT_ALL));
    rig_end(&r);
}

static void a_failed_destination(void)
{
    destination_fails(VS_DISK_WRITE);
    destination_fails(VS_DISK_FLUSH);
}

/* The record cannot be written: what would depend on it is an error. */
static void a_failed_record(void)
{
    struct rig r = rig_begin(1, F_USUAL);
    struct lane *l = &r.lane[0];
    rig_mirror(&r);
    vs_test_disk_fault(r.destination, VS_DISK_WRITE, EIO, 0, -1);
    CHECK_EQUAL(lane_fill(l, 8, 4096, 1), VIRTIO_BLK_S_OK);
    lane_send(l, 0, VIRTIO_BLK_T_FLUSH, 0, 0);
    rig_wait_seen(&r, VS_EV_DEGRADED, 1);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_RECORD_WRITTEN, ENOSPC), 0);
    CHECK_EQUAL(lane_wait(l), 0);
    CHECK_EQUAL(lane_status(l, 0), VIRTIO_BLK_S_IOERR);
    rig_end(&r);
}

static void a_hanging_destination(void)
{
    struct vs_engine_config config = rig_config();
    config.destination_timeout_us = 100000;
    struct rig r = rig_make(&config, rig_test_disk());
    rig_attach(&r, 1, F_USUAL);
    rig_mirror(&r);
    vs_test_disk_hold(r.destination, VS_DISK_WRITE, 1);
    CHECK_EQUAL(lane_fill(&r.lane[0], 8, 4096, 1), VIRTIO_BLK_S_OK);
    lane_send(&r.lane[0], 0, VIRTIO_BLK_T_FLUSH, 0, 0);
    rig_wait_seen(&r, VS_EV_DEGRADED, 1);
    CHECK_EQUAL(r.last[VS_EV_DEGRADED].reason, VS_REASON_DESTINATION_TIMEOUT);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_RECORD_WRITTEN, 0), 0);
    CHECK_EQUAL(lane_wait(&r.lane[0]), 0);
    /* Fenced until its last request is over. */
    CHECK(rig_snapshot(&r).fenced > 0);
    vs_disk *other = vs_test_disk(DISK_BYTES, 512);
    CHECK_EQUAL(rig_mirror_start(&r, other), -EBUSY);
    vs_disk_close(other);
    vs_test_disk_release(r.destination, VS_DISK_WRITE, 100);
    rig_wait_seen(&r, VS_EV_FENCE_CLEAR, 1);
    CHECK_EQUAL(rig_snapshot(&r).fenced, 0);
    rig_end(&r);
}

/* Let go of with those of a group: as if it were lost, but that nothing has failed. */
static void leaving_with_a_group(void)
{
    struct rig r = rig_begin(1, F_USUAL);
    struct lane *l = &r.lane[0];
    CHECK_EQUAL(rig_simple(&r, VS_CMD_MIRROR_LEAVE, 0), -ENOTCONN);
    rig_mirror(&r);
    CHECK_EQUAL(lane_fill(l, 8, 4096, 1), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(lane_flush(l), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_MIRROR_LEAVE, 0), 0);
    rig_wait_seen(&r, VS_EV_DEGRADED, 1);
    CHECK_EQUAL(r.state, VS_DEGRADED);
    CHECK_EQUAL(r.last[VS_EV_DEGRADED].reason, VS_REASON_GROUP);
    CHECK_EQUAL(r.last[VS_EV_DEGRADED].result, 0);
    CHECK_EQUAL(r.last[VS_EV_DEGRADED].differed, 0);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_MIRROR_LEAVE, 0), -ENOTCONN);
    CHECK_EQUAL(lane_fill(l, 8, 4096, 2), VIRTIO_BLK_S_OK); /* a write waits for nobody, and does not get there */
    lane_send(l, 0, VIRTIO_BLK_T_FLUSH, 0, 0);
    CHECK(rig_snapshot(&r).record_pending);
    CHECK_EQUAL(lane_poll(l), -1);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_RECORD_WRITTEN, 0), 0);
    CHECK_EQUAL(lane_wait(l), 0);
    CHECK_EQUAL(lane_status(l, 0), VIRTIO_BLK_S_OK);
    rig_wait_seen(&r, VS_EV_FENCE_CLEAR, 1);
    CHECK(disk_holds(r.destination, 8, 4096, 1, CUT_ALL) && disk_holds(r.source, 8, 4096, 2, CUT_ALL));
    vs_test_disk_drop(r.destination);
    rig_mirror(&r);
    CHECK(disks_equal(r.source, r.destination, CUT_ALL));
    rig_end(&r);
}

static void check_left(struct rig *r, uint32_t differed)
{
    unsigned seen = r->seen[VS_EV_DEGRADED], closed = r->seen[VS_EV_FENCE_CLEAR];
    CHECK_EQUAL(rig_simple(r, VS_CMD_MIRROR_LEAVE, 0), 0);
    rig_wait_seen(r, VS_EV_DEGRADED, seen + 1);
    CHECK_EQUAL(r->last[VS_EV_DEGRADED].differed, differed);
    CHECK_EQUAL(rig_simple(r, VS_CMD_RECORD_WRITTEN, 0), 0);
    rig_wait_seen(r, VS_EV_FENCE_CLEAR, closed + 1);
    vs_test_disk_drop(r->destination);
    rig_mirror(r);
}

/* Whether a destination was a copy is told of the moment in which it is lost, for a guest that writes heals it. */
static void a_destination_that_was_no_copy(void)
{
    struct rig r = begin_without_checkpoints(1);
    struct lane *l = &r.lane[0];
    CHECK_EQUAL(lane_fill(l, 0, 4096, 9), VIRTIO_BLK_S_OK); /* no hole, which is not read */
    vs_test_disk_spoil(r.source, 0, 4096);
    rig_mirror(&r);
    check_left(&r, 1); /* it lacks what the source could not give */
    CHECK_EQUAL(lane_fill(l, 0, 4096, 1), VIRTIO_BLK_S_OK);
    check_left(&r, 1); /* which is written by now, and not durable there */
    CHECK_EQUAL(lane_flush(l), VIRTIO_BLK_S_OK);
    check_left(&r, 0);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_PEER_DIFFERS, 1), 0);
    check_left(&r, 1);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_PEER_DIFFERS, 0), 0);
    vs_test_disk_fault(r.source, VS_DISK_WRITE, EIO, 0, 1);
    CHECK_EQUAL(lane_fill(l, 8, 4096, 2), VIRTIO_BLK_S_IOERR);
    check_left(&r, 1); /* nobody knows what the source holds */
    rig_end(&r);
}

static void refused_destinations(void)
{
    struct rig r = rig_begin(1, F_USUAL);
    vs_disk *small = vs_test_disk(DISK_BYTES - 512, 512), *coarse = vs_test_disk(DISK_BYTES, 4096);
    CHECK_EQUAL(rig_mirror_start(&r, small), -ENOSPC);
    CHECK_EQUAL(rig_mirror_start(&r, coarse), -EINVAL);
    vs_disk_close(small);
    vs_disk_close(coarse);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_MIRROR_DRAIN, 0), -ENOTCONN);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_MIRROR_DRAIN, 1), -ENOTCONN);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_GATE, 1000), -ENOTCONN);
    CHECK_EQUAL(rig_exchange(&r, 0), -ENOTCONN);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_UNGATE, 0), 0);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_MIRROR_STOP, 0), 0);
    rig_mirror(&r);
    small = vs_test_disk(DISK_BYTES, 512);
    CHECK_EQUAL(rig_mirror_start(&r, small), -EBUSY);
    vs_disk_close(small);
    rig_end(&r);
}

/* ---- the switch -------------------------------------------------------------------- */

static void switched(bool keep)
{
    struct rig r = rig_begin(1, F_USUAL);
    struct lane *l = &r.lane[0];
    rig_mirror(&r);
    for (unsigned round = 0; round < 3; round++) {
        vs_disk *old = r.source, *new = r.destination;
        uint8_t mark = (uint8_t)(0x60 + 4 * round);
        CHECK_EQUAL(lane_fill(l, 0, 4096, mark), VIRTIO_BLK_S_OK);
        CHECK_EQUAL(rig_simple(&r, VS_CMD_MIRROR_DRAIN, 1), 0);
        CHECK_EQUAL(lane_fill(l, 8, 4096, mark), VIRTIO_BLK_S_OK);
        CHECK_EQUAL(rig_simple(&r, VS_CMD_GATE, UNHURRIED_US), 0);
        memset(lane_data(l, 0), mark + 1, 4096);
        lane_send(l, 0, VIRTIO_BLK_T_OUT, 16, 4096);
        CHECK(rig_snapshot(&r).gated);
        CHECK_EQUAL(lane_poll(l), -1);
        CHECK(disks_equal(old, new, CUT_NONE)); /* M = G */
        struct vs_event done = rig_wait(
            &r, rig_submit(&r, &(struct vs_command){.kind = VS_CMD_EXCHANGE, .fd = -1, .exchange.flags = keep}));
        CHECK_EQUAL(done.result, 0);
        CHECK(done.value > 0);
        CHECK_EQUAL(lane_wait(l), 0);
        CHECK_EQUAL(lane_status(l, 0), VIRTIO_BLK_S_OK);
        CHECK(disk_holds(new, 16, 4096, mark + 1, CUT_NONE));
        CHECK_EQUAL(lane_flush(l), VIRTIO_BLK_S_OK);
        CHECK(disk_holds(new, 16, 4096, mark + 1, CUT_ALL) && disk_holds(new, 8, 4096, mark, CUT_ALL));
        r.source = new;
        r.destination = old;
        if (keep) {
            CHECK(disks_equal(old, new, CUT_ALL));
            CHECK_EQUAL(r.state, VS_STEADY);
        } else {
            CHECK(!disk_holds(old, 16, 4096, mark + 1, CUT_NONE));
            rig_wait_state(&r, VS_PASSTHROUGH);
            vs_test_disk_drop(old);
            rig_mirror(&r);
        }
    }
    rig_end(&r);
}

static void the_switch(void)
{
    switched(false);
    switched(true);
}

/* A source that cannot be flushed any more can still be left. */
static void leaving_a_bad_source(void)
{
    struct rig r = begin_without_checkpoints(1);
    struct lane *l = &r.lane[0];
    rig_mirror(&r);
    CHECK_EQUAL(lane_fill(l, 0, 4096, 1), VIRTIO_BLK_S_OK);
    vs_test_disk_fault(r.source, VS_DISK_FLUSH, EIO, 0, -1);
    CHECK_EQUAL(lane_flush(l), VIRTIO_BLK_S_IOERR);
    CHECK(rig_simple(&r, VS_CMD_MIRROR_DRAIN, 1) < 0);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_MIRROR_DRAIN, 0), 0);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_GATE, UNHURRIED_US), 0);
    CHECK_EQUAL(rig_exchange(&r, 1), -EBUSY); /* not as a mirror */
    CHECK_EQUAL(rig_exchange(&r, 0), 0);
    CHECK(disk_holds(r.destination, 0, 4096, 1, CUT_ALL));
    CHECK_EQUAL(lane_fill(l, 8, 4096, 2), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(lane_flush(l), VIRTIO_BLK_S_OK);
    CHECK(disk_holds(r.destination, 8, 4096, 2, CUT_ALL));
    rig_end(&r);
}

/* What cannot be drained in time reopens the gate; the guest is still on the source. */
static void a_gate_that_times_out(void)
{
    struct rig r = rig_begin(1, F_USUAL);
    struct lane *l = &r.lane[0];
    rig_mirror(&r);
    vs_test_disk_hold(r.destination, VS_DISK_WRITE, 1);
    CHECK_EQUAL(lane_fill(l, 0, 4096, 1), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_GATE, 20000), -ETIMEDOUT);
    CHECK(!rig_snapshot(&r).gated);
    CHECK_EQUAL(lane_fill(l, 0, 4096, 2), VIRTIO_BLK_S_OK);
    vs_test_disk_hold(r.destination, VS_DISK_WRITE, 0);
    vs_test_disk_release(r.destination, VS_DISK_WRITE, 100);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_GATE, UNHURRIED_US), 0);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_UNGATE, 0), 0);
    CHECK_EQUAL(lane_fill(l, 0, 4096, 3), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(r.state, VS_STEADY);
    rig_end(&r);
}

/* A drain behind a closed gate, and an exchange right after it. */
static void a_drain_behind_the_gate(void)
{
    struct rig r = rig_begin(1, F_USUAL);
    rig_mirror(&r);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_MIRROR_DRAIN, 1), 0);
    CHECK_EQUAL(lane_fill(&r.lane[0], 0, 4096, 1), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_GATE, UNHURRIED_US), 0);
    vs_test_disk_hold(r.source, VS_DISK_FLUSH, 1);
    rig_submit(&r, &(struct vs_command){.kind = VS_CMD_MIRROR_DRAIN, .fd = -1, .value = 1});
    while (vs_test_disk_held(r.source, VS_DISK_FLUSH) == 0)
        rig_snapshot(&r);
    int result = rig_exchange(&r, 1);
    CHECK(result == 0 || result == -EBUSY);
    CHECK_EQUAL(rig_simple(&r, VS_CMD_UNGATE, 0), 0);
    vs_test_disk_hold(r.source, VS_DISK_FLUSH, 0);
    vs_test_disk_release(r.source, VS_DISK_FLUSH, 100);
    CHECK_EQUAL(lane_flush(&r.lane[0]), VIRTIO_BLK_S_OK);
    rig_end(&r);
}

int main(void)
{
    test("copy and steady", copy_and_steady);
    test("the count check", count_check);
    test("the same bytes", the_same_bytes);
    test("a failed destination", a_failed_destination);
    test("a failed record", a_failed_record);
    test("a hanging destination", a_hanging_destination);
    test("leaving with a group", leaving_with_a_group);
    test("a destination that was no copy", a_destination_that_was_no_copy);
    test("refused destinations", refused_destinations);
    test("the switch", the_switch);
    test("leaving a bad source", leaving_a_bad_source);
    test("a gate that times out", a_gate_that_times_out);
    test("a drain behind the gate", a_drain_behind_the_gate);
    return tests_end();
}
