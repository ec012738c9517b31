# SPDX-License-Identifier: Apache-2.0
"""The seeded faults of mutations.py: the rule of docs/durability.md, how it is broken, which test notices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    name: str
    rule: str
    """What docs/durability.md says, in short."""
    file: str
    """In c_shim/."""
    old: str
    new: str
    test: str
    """pytest's name of the test."""


def _m(name: str, rule: str, file: str, old: str, new: str, test: str) -> Mutation:
    return Mutation(name, rule, file, old, new, f"tests/model/test_{test}")


MUTATIONS = [
    # -- the counts ----------------------------------------------------------------
    _m(
        "f-at-completion",
        "F is M as it was when the destination's flush began",
        "guest_flush.c",
        "counts_destination_flushed(&e->counts, f->destination_prefix);",
        "counts_destination_flushed(&e->counts, e->counts.writes_mirrored);",
        "flush.py::test_f_is_m_as_it_was_when_the_flush_began",
    ),
    _m(
        "source-flushed-at-completion",
        "source_flushed is G as it was when the source's flush began",
        "guest_flush.c",
        "counts_source_flushed(&e->counts, f->source_generation);",
        "counts_source_flushed(&e->counts, e->counts.source_generation);",
        "flush.py::test_source_flushed_is_g_as_it_was_when_the_flush_began",
    ),
    _m(
        "m-not-a-prefix",
        "M: the destination holds every write 1..M",
        "replicator.c",
        "counts_mirrored(&e->counts, log_mirrored_prefix(&e->log, e->counts.source_generation));",
        "counts_mirrored(&e->counts, e->counts.source_generation);",
        "flush.py::test_m_is_a_contiguous_prefix",
    ),
    _m(
        "g-counts-nothing",
        "G counts writes completed on the source, zeroing too",
        "counts.c",
        "c->source_generation++;\n    return c->source_generation;",
        "return c->source_generation + 1;",
        "switch.py::test_attaching_with_counts_already_high",
    ),
    _m(
        "r-not-sampled",
        "R is G sampled after the flush was popped",
        "counts.c",
        "raise_to(&c->flush_request, c->source_generation);\n    return c->source_generation;",
        "raise_to(&c->flush_request, c->source_generation);\n    return 0;",
        "flush.py::test_flush_waits_for_replication",
    ),
    _m(
        "steady-f-too-new",
        "steady: M and F are what was on the destination when its flush began",
        "mirror.c",
        "counts_enter_steady(&e->counts, m->steady_prefix);",
        "counts_enter_steady(&e->counts, log_mirrored_prefix(&e->log, e->counts.source_generation));",
        "flush.py::test_steady_begins_with_a_flush_that_began_late_enough",
    ),
    _m(
        "steady-before-the-copy-ends",
        "steady: no region is dirty, none is on its way",
        "copier.c",
        "return e->to_copy.dirty == 0 && e->copier.in_use == 0;",
        "return e->to_copy.dirty == 0;",
        "order.py::test_a_stale_read_never_overtakes_a_write",
    ),
    _m(
        "steady-with-uncaptured-writes",
        "steady: no uncaptured write is in flight",
        "copier.c",
        "if (e->mirror.state != VS_SYNCING || e->mirror.uncaptured_writes)",
        "if (e->mirror.state != VS_SYNCING)",
        "order.py::test_scribbling_during_a_write_that_the_copy_must_bring_over",
    ),
    # -- the count check -----------------------------------------------------------
    _m(
        "held-when-only-mirrored",
        "R <= F: held; F < R <= M: flush the destination now",
        "counts.c",
        "if (flush_request <= writes_flushed)",
        "if (flush_request <= writes_mirrored)",
        "flush.py::test_flush_is_held_back_with_either_disk",
    ),
    _m(
        "flush-before-replication",
        "M < R: wait for replication to reach R",
        "counts.c",
        "return flush_request <= writes_mirrored ? VS_CHECK_FLUSH : VS_CHECK_WAIT;",
        "return VS_CHECK_FLUSH;",
        "flush.py::test_flush_waits_for_replication",
    ),
    _m(
        "always-flush",
        "R <= F: nothing to do there",
        "counts.c",
        "if (flush_request <= writes_flushed)\n        return VS_CHECK_HELD;",
        "if (flush_request < writes_flushed)\n        return VS_CHECK_HELD;",
        "flush.py::test_what_the_disks_hold_already_is_confirmed_without_a_flush",
    ),
    _m(
        "source-not-flushed",
        "beside it the source is flushed",
        "guest_flush.c",
        "if (want_source && !f->source_in_flight)",
        "if (want_source && !f->source_in_flight && e->mirror.state != VS_STEADY)",
        "flush.py::test_flush_is_held_back_with_either_disk",
    ),
    _m(
        "two-destination-flushes",
        "at most one destination flush is in flight",
        "guest_flush.c",
        "if (want_destination && !f->destination_in_flight)",
        "if (want_destination)",
        "flush.py::test_waiting_flushes_share_and_one_is_in_flight",
    ),
    _m(
        "generation-0-is-nothing",
        "a former process may have left unflushed writes: the first flush reaches the source",
        "counts.c",
        "return c->source_flush_known && flush_request <= c->source_flushed;",
        "return flush_request <= c->source_flushed;",
        "flush.py::test_passthrough_flush_at_generation_0_reaches_the_source",
    ),
    _m(
        "waiting-flush-forgotten",
        "a waiting flush is decided anew when the state changes",
        "mirror.c",
        "e->flush.dirty = true; /* waiting flushes are decided anew */",
        "",
        "flush.py::test_a_waiting_flush_is_decided_anew_when_the_mirror_is_stopped",
    ),
    _m(
        "failed-source-flush-confirmed",
        "a failed source flush is the guest's IOERR",
        "guest_flush.c",
        "    if (io->result == 0) {\n        counts_source_flushed",
        "    if (io->result <= 0) {\n        counts_source_flushed",
        "faults.py::test_a_failed_source_flush_is_the_guests_error",
    ),
    _m(
        "failed-flush-forgotten",
        "in buffered mode it stays an error until a switch",
        "disk.c",
        "disk->flush_failed = true;",
        "disk->flush_failed = false;",
        "faults.py::test_a_failed_flush_of_a_buffered_source_stays_an_error_until_a_switch",
    ),
    _m(
        "failed-destination-flush-counts",
        "a failed destination flush degrades the mirror",
        "guest_flush.c",
        "        mirror_degrade(e, VS_REASON_DESTINATION_FLUSH, io->result);\n    else\n",
        "        (void)0;\n",
        "faults.py::test_a_failed_destination_flush_is_recorded_first_and_then_the_sources_result_decides",
    ),
    _m(
        "record-not-awaited",
        "the record is durable before a flush is confirmed without the destination",
        "mirror.c",
        "m->record = RECORD_PENDING;",
        "m->record = RECORD_WRITTEN;",
        "faults.py::test_a_failed_destination_write_degrades_the_mirror_and_not_the_guest",
    ),
    _m(
        "failed-record-ignored",
        "what the record could not be written for is not confirmed",
        "guest_flush.c",
        "e->mirror.record == RECORD_FAILED ? -EIO : 0",
        "0",
        "faults.py::test_a_record_that_cannot_be_written_fails_the_flushes_that_wait_for_it",
    ),
    # -- write-through -------------------------------------------------------------
    _m(
        "write-through-ignored",
        "a write is a write plus a flush of its own generation when the guest runs write-through",
        "request_path.c",
        "    if (r->write_through) {",
        "    if (r->write_through && r->blk.op == VS_OP_FLUSH) {",
        "flush.py::test_write_through_by_the_write_cache_switch",
    ),
    _m(
        "write-through-zeroing-ignored",
        "write-through: discard and write-zeroes too",
        "request_path.c",
        "    if (r->write_through) {",
        "    if (r->write_through && r->blk.op == VS_OP_WRITE) {",
        "flush.py::test_zeroes_are_written_through_too",
    ),
    _m(
        "write-through-by-features-ignored",
        "FLUSH offered and neither FLUSH nor CONFIG_WCE negotiated is write-through",
        "request_path.c",
        "|| !(q->attachment->features & able)",
        "|| (q->attachment->features & able & ~able)",
        "flush.py::test_write_through_of_a_driver_that_cannot_flush",
    ),
    # -- rule 1: the same bytes ----------------------------------------------------
    _m(
        "source-from-the-guests-buffer",
        "rule 1: the source is written from the captured copy",
        "request_path.c",
        "    if (buffer) {",
        "    if (r->bounce) {",
        "order.py::test_scribbling_on_a_buffer_while_the_source_is_written",
    ),
    # -- rule 2: the same order ----------------------------------------------------
    _m(
        "no-turns-on-the-source",
        "rule 2: writes that overlap while in flight are serialised on the source",
        "request_path.c",
        "if (range_take(&e->source_slots, &r->slot, r->blk.offset, r->blk.length))",
        "if (range_take(&e->source_slots, &r->slot, r->blk.offset, 512))",
        "order.py::test_overlapping_writes_of_two_queues_take_turns",
    ),
    _m(
        "no-turns-on-the-destination",
        "rule 2: overlapping writes reach both disks in the same order",
        "replicator.c",
        "if (range_take(&e->mirror.slots, &p->slot, p->io.offset, p->io.length))",
        "if (range_take(&e->mirror.slots, &p->slot, p->io.offset, 512))",
        "order.py::test_overlapping_writes_of_two_queues_take_turns",
    ),
    _m(
        "turns-out-of-order",
        "rule 2: the turns are taken in the order of asking",
        "range_slots.c",
        "if (w->granted || !overlap(w, slot) || blocked(s, w))",
        "if (w->granted || !overlap(w, slot))",
        "order.py::test_a_storm_of_overlapping_writes_completed_in_any_order",
    ),
    # -- rule 3: one ordering point ------------------------------------------------
    _m(
        "copy-has-no-place",
        "rule 3: a region copy takes its place in the order before its read starts",
        "copier.c",
        "range_take(&e->mirror.slots, &c->slot, offset, length);",
        "range_take(&e->mirror.slots, &c->slot, offset, 512);",
        "order.py::test_a_stale_read_never_overtakes_a_write",
    ),
    _m(
        "left-to-a-copy-that-has-begun",
        "rule 3: writes that complete after a copy's place was taken are captured and follow it",
        "replicator.c",
        "return e->mirror.state == VS_SYNCING && dirty_map_all_dirty(",
        "return e->mirror.state == VS_SYNCING || dirty_map_all_dirty(",
        "order.py::test_a_write_during_the_read_of_its_region",
    ),
    _m(
        "zeroes-left-out",
        "the copy: zeroes are left out only where the destination has them",
        "copier.c",
        "if (zero && disk_hole_end(e->mirror.disk, at, at + c->piece) == at + c->piece) {",
        "if (zero) {",
        "order.py::test_the_copy_overwrites_what_the_destination_held_before",
    ),
    # -- rule 5: doubt -------------------------------------------------------------
    _m(
        "no-doubt",
        "rule 5: a failed source write leaves its range in doubt",
        "request_path.c",
        "doubt_add(&e->doubt, r->blk.offset, r->blk.length); /* rule 5 */",
        "",
        "faults.py::test_a_failed_source_write_is_the_guests_error_and_puts_its_range_in_doubt",
    ),
    _m(
        "doubt-for-ever",
        "rule 5: until a guest write covers it",
        "request_path.c",
        "doubt_clear(&e->doubt, r->blk.offset, r->blk.length);",
        "(void)0;",
        "faults.py::test_doubt_ends_where_a_write_covers_it",
    ),
    _m(
        "doubt-does-not-stop-a-switch",
        "rule 5: a range in doubt stands in the way of a switch",
        "mirror.c",
        "|| e->doubt.count ||",
        "||",
        "switch.py::test_a_range_in_doubt_stands_in_the_way",
    ),
    _m(
        "failed-write-mirrored",
        "rule 5: doubtful data is never copied over a good destination",
        "request_path.c",
        "    if (r->entry)\n        log_abandon(&e->log, r->entry);\n    finish(r, VIRTIO_BLK_S_IOERR);",
        "    if (r->entry)\n        log_append(&e->log, r->entry, counts_write_completed(&e->counts), 1);\n"
        "    finish(r, VIRTIO_BLK_S_IOERR);",
        "faults.py::test_a_failed_source_write_is_the_guests_error_and_puts_its_range_in_doubt",
    ),
    # -- rule 6: bounded -----------------------------------------------------------
    _m(
        "no-bound-in-time",
        "rule 6: the log has a bound in time",
        "throttle.c",
        "double by_time = t->max_lag_ns ? (double)lag_ns / (double)t->max_lag_ns : 0;",
        "double by_time = (double)lag_ns * 0;",
        "order.py::test_the_log_is_bounded_in_time_too",
    ),
    # -- rule 7: a destination never hangs a guest ---------------------------------
    _m(
        "no-destination-timeout",
        "rule 7: nothing waits for it longer than destination_timeout",
        "mirror.c",
        "if (mirror_deadline_ns(e) <= engine_now(e))",
        "if (mirror_deadline_ns(e) == 1)",
        "faults.py::test_a_destination_that_hangs_is_given_up_and_fenced",
    ),
    _m(
        "no-stop-timeout",
        "rule 7: GET_VRING_BASE no longer than stop_timeout",
        "attachment.c",
        "if (attachments_deadline_ns(e) <= engine_now(e) && mirror_attached(&e->mirror))",
        "if (attachments_deadline_ns(e) == 1 && mirror_attached(&e->mirror))",
        "faults.py::test_stopping_a_ring_waits_for_the_destination_no_longer_than_the_stop_timeout",
    ),
    _m(
        "failed-destination-write-ignored",
        "states: a destination that failed degrades the mirror",
        "replicator.c",
        "if (current && io->result < 0) {",
        "if (current && io->result == -1) {",
        "faults.py::test_a_failed_destination_write_degrades_the_mirror_and_not_the_guest",
    ),
    # -- rule 8: late writes are fenced --------------------------------------------
    _m(
        "no-fence",
        "rule 8: it cannot be attached again until every request submitted to it has completed",
        "mirror.c",
        "if (mirror_attached(m) || m->former ||",
        "if (mirror_attached(m) ||",
        "faults.py::test_a_destination_that_hangs_is_given_up_and_fenced",
    ),
    _m(
        "buffers-given-back-early",
        "rule 8: log buffers stay owned until every request has completed",
        "replicator.c",
        "if (!p->submitted)\n            release(p);",
        "if (p->epoch)\n            release(p);",
        "faults.py::test_buffers_stay_owned_until_a_late_write_is_over",
    ),
    _m(
        "late-flush-counts",
        "rule 8: completions after degrading move no count",
        "guest_flush.c",
        "    if (f->destination_epoch != e->mirror.epoch)\n        return;\n    if (io->result < 0)",
        "    if (io->result < 0)",
        "faults.py::test_a_destination_that_hangs_is_given_up_and_fenced",
    ),
    _m(
        "captured-for-a-former-mirror",
        "rule 8: what was captured for a former mirror is not in the next one's log",
        "request_path.c",
        "return r->captured && r->mirror_epoch == r->engine->mirror.epoch;",
        "return r->captured;",
        "faults.py::test_a_write_that_was_captured_for_a_mirror_that_is_gone",
    ),
    # -- rule 9: the same reading --------------------------------------------------
    _m(
        "discard-not-replicated",
        "rule 9: discard reads as zeroes afterwards on both disks",
        "replicator.c",
        "return e->mirror.state == VS_SYNCING && dirty_map_all_dirty(",
        "return entry->kind == LOG_ZERO || dirty_map_all_dirty(",
        "order.py::test_zeroing_takes_turns_with_writes",
    ),
    _m(
        "small-destination",
        "rule 9: the destination holds at least the guest-visible capacity",
        "mirror.c",
        "if (disk->bytes < e->config.capacity_bytes)",
        "if (disk->bytes == 0)",
        "switch.py::test_a_destination_that_does_not_fit_is_refused",
    ),
    _m(
        "large-blocks",
        "rule 9: a destination whose logical block is larger than the guest's is refused",
        "mirror.c",
        "if (disk->block_bytes > e->config.block_bytes)",
        "if (disk->block_bytes > 65536)",
        "switch.py::test_a_destination_that_does_not_fit_is_refused",
    ),
    # -- the switch ----------------------------------------------------------------
    _m(
        "gate-does-not-drain",
        "switch: replication drains until M = G",
        "engine.c",
        "return e->requests_in_flight == 0 && log_drained(&e->log) && e->replicator.in_use == 0 &&\n"
        "           e->source->stats.in_flight == 0 && e->mirror.disk->stats.in_flight == 0;",
        "return e->requests_in_flight == 0;",
        "switch.py::test_the_gate_lets_those_in_flight_finish",
    ),
    _m(
        "gate-stands-open",
        "switch: take up no new requests",
        "engine.c",
        "    struct list *node;\n    if (e->gate != GATE_OPEN)\n        return;",
        "    struct list *node;",
        "switch.py::test_requests_that_arrive_at_the_gate_go_to_the_new_disk",
    ),
    _m(
        "gate-for-ever",
        "switch: bounded by max_pause, and the gate opens again",
        "engine.c",
        "else if (engine_now(e) >= e->gate_deadline_ns)",
        "else if (e->gate_deadline_ns == 1)",
        "switch.py::test_a_gate_that_takes_too_long_is_opened_again",
    ),
    _m(
        "exchange-ungated",
        "switch: nothing is exchanged before the gate is closed",
        "mirror.c",
        "if (e->gate != GATE_CLOSED || e->doubt.count",
        "if (e->doubt.count",
        "switch.py::test_an_exchange_without_a_closed_gate_is_refused",
    ),
    _m(
        "kept-f-is-wrong",
        "switch, keep-mirror: F is the old source_flushed",
        "counts.c",
        "c->writes_flushed = old_source_flushed;",
        "c->writes_flushed = c->writes_mirrored;",
        "switch.py::test_the_flushed_counts_change_places_with_the_disks",
    ),
    _m(
        "source-flushed-is-not-the-old-f",
        "switch: source_flushed is the old F",
        "counts.c",
        "c->source_flushed = c->writes_flushed;",
        "c->source_flushed = c->source_generation;",
        "switch.py::test_what_the_new_source_does_not_hold_durably_is_flushed",
    ),
    _m(
        "drain-does-not-flush",
        "mirror-cancel drains and flushes",
        "engine.c",
        "guest_flush_wait(e, &d->waiter, e->counts.source_generation);",
        "guest_flush_wait(e, &d->waiter, 0);",
        "switch.py::test_cancel_leaves_a_named_point_in_time",
    ),
    # -- what differs (rule 4) -------------------------------------------------------
    _m(
        "write-unmarked",
        "rule 4: a region's bit is set before the source write is submitted",
        "request_path.c",
        "    difference_mark(e, r->blk.offset, r->blk.length);\n    r->slot.grant = slot_granted;",
        "    r->slot.grant = slot_granted;",
        "resync.py::test_after_a_cancel_only_what_was_written_is_copied",
    ),
    _m(
        "checkpoint-forgets-the-source",
        "rule 4: a write in flight while a checkpoint begins is not covered by it",
        "difference.c",
        "    request_path_mark_in_flight(e);\n",
        "",
        "resync.py::test_a_write_in_flight_while_a_checkpoint_passes_stays_different",
    ),
    _m(
        "checkpoint-forgets-the-log",
        "rule 4: a checkpoint waits until the destination has what it covers",
        "difference.c",
        "        else if (e->gate == GATE_OPEN && engine_now(e) >= d->next_ns &&\n"
        "                 log_mirrored_prefix(&e->log, e->counts.source_generation) >= d->generation)",
        "        else if (e->gate == GATE_OPEN && engine_now(e) >= d->next_ns)",
        "resync.py::test_a_write_that_is_not_mirrored_yet_stays_different",
    ),
    _m(
        "checkpoint-without-flush",
        "rule 4: cleared only after successful flushes of both disks",
        "difference.c",
        "    if (d->flush_failed) {",
        "    if (false) {",
        "resync.py::test_a_failed_flush_settles_nothing",
    ),
    _m(
        "doubt-settled",
        "rule 5: a range in doubt stays dirty",
        "difference.c",
        "|| doubt_overlaps(&e->doubt, offset, length);",
        ";",
        "resync.py::test_a_range_in_doubt_stays_different",
    ),
]
