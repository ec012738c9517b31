# SPDX-License-Identifier: Apache-2.0
"""The mirror's policy and the state record against a disk that fails at the worst moment."""

from __future__ import annotations

import errno
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

from tests.engine_driver import DiskOp
from tests.frontend import Status
from tests.model.rig import BLOCK, pattern
from tests.model.stage import SIZE, WAIT_S, Stage, play, until
from vhostsync.engine.engine_event import EngineEvent, EventKind
from vhostsync.errors import DiskError, MirrorError, StateRecordError, SwitchError
from vhostsync.mirror import peer, record_keeper
from vhostsync.mirror.destination import Place, look_again
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror_target import MirrorTarget
from vhostsync.record.record_store import Prepared
from vhostsync.record.state_record import StateRecord, Worth
from vhostsync.storage import local as disks
from vhostsync.storage.identity import DiskIdentity


@pytest.mark.parametrize("turn", range(3))
def test_the_old_disk_fails_right_after_the_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    """R9: a dying source is why one switches. Its first replicated write fails; the record must name the new
    disk all the same, before the guest's next flush is confirmed."""

    async def scene(it: Stage) -> None:
        await it.steady()
        exchange = it.engine.exchange

        async def exchange_and_fail(**how: bool) -> int:
            it.first.fault(DiskOp.WRITE, errno.EIO, count=-1)
            waiting.append(it.guest.write(BLOCK, pattern(2)))  # at the closed gate: goes to the new disk
            return await exchange(**how)

        waiting = [await it.guest_does(partial(it.guest.write_now, 0, pattern(1)))]
        monkeypatch.setattr(it.engine, "exchange", exchange_and_fail)
        result = await it.mirror.switch(deadline_s=5, max_pause_ms=2000, keep_mirror=True)
        assert result.source_path == str(it.paths[1])
        flush = await it.guest_does(it.guest.flush_now)
        assert flush.ok and waiting[1].ok
        record = it.record()
        assert (record.epoch, record.current.path) == (2, str(it.paths[1]))
        assert record.peer is not None and record.peer.path == str(it.paths[0])
        assert record.peer_worth is Worth.OUTDATED
        assert it.mirror.source_path == str(it.paths[1]) and it.mirror.state is MirrorState.DEGRADED

    play(scene, tmp_path, monkeypatch)


def test_switches_whose_deadline_passes_leave_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(it: Stage) -> None:
        await it.steady()
        for turn in range(30):
            with suppress(SwitchError):  # or it is in time
                await it.mirror.switch(deadline_s=0.0005 * turn, max_pause_ms=100, keep_mirror=True)
        assert not list(tmp_path.glob("*.new*"))

    play(scene, tmp_path, monkeypatch)


def test_a_cancel_while_the_record_is_being_told_of_steady(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R18: the record's last word is that of the cancel."""

    async def scene(it: Stage) -> None:
        await it.mirror.start(MirrorTarget(str(it.paths[1]), cache="writeback"))
        it.state_file.hold = True
        await until(lambda: it.mirror.state is MirrorState.STEADY)
        await until(it.state_file.reached.is_set)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(it.mirror.cancel, force=True))
            await anyio.sleep(0.05)  # it may only wait, or overtake
            it.state_file.release.set()
        assert it.mirror.state is MirrorState.PASSTHROUGH
        assert it.record().peer_worth is Worth.OUTDATED

    play(scene, tmp_path, monkeypatch)


def test_a_destination_that_fails_during_a_cancel_by_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R19: both have the record say "outdated" at once; the guest's flush gets no error for it."""

    async def scene(it: Stage) -> None:
        await it.steady()
        await it.guest_does(partial(it.guest.write_now, 0, pattern(1)))
        it.second.hold(DiskOp.FLUSH)
        flush = it.guest.flush()
        await until(lambda: it.second.held(DiskOp.FLUSH) > 0)
        it.second.fault(DiskOp.FLUSH, errno.EIO, count=-1)
        it.state_file.hold = True
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(it.mirror.cancel, force=True))
            await until(it.state_file.reached.is_set)
            it.second.release(DiskOp.FLUSH)
            await until(lambda: it.mirror.state is not MirrorState.STEADY)
            it.state_file.release.set()
        await it.guest_does(partial(it.guest.wait, flush))
        assert flush.ok
        assert it.record().peer_worth is Worth.OUTDATED

    play(scene, tmp_path, monkeypatch)


def test_a_start_right_after_a_loss_waits_for_the_record_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is being written: that is no reason to say that it cannot be."""

    async def scene(it: Stage) -> None:
        await it.steady()
        it.state_file.hold = True
        it.second.fault(DiskOp.WRITE, errno.EIO, count=1)
        await it.guest_does(partial(it.guest.write_now, 0, pattern(1)))
        await until(lambda: it.mirror.state is MirrorState.DEGRADED)
        await until(it.state_file.reached.is_set)
        await until(lambda: not it.mirror.fenced)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(it.mirror.start, MirrorTarget(str(it.paths[1]), cache="writeback"))
            await anyio.sleep(0.05)  # it may only wait
            it.state_file.release.set()
        await until(lambda: it.mirror.state is MirrorState.STEADY)

    play(scene, tmp_path, monkeypatch)


def looks_of(monkeypatch: pytest.MonkeyPatch) -> list[Place]:
    """Where the mirror has noted how a lost destination looks, from here on."""
    looks: list[Place] = []

    def look(place: Place) -> DiskIdentity | None:
        found = look_again(place)
        looks.append(place)
        return found

    monkeypatch.setattr(peer, "look_again", look)
    return looks


def test_a_record_that_cannot_be_written_delays_no_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R21: how the lost destination looks is noted before anybody can have changed it."""

    async def scene(it: Stage) -> None:
        await it.steady()
        looks = looks_of(monkeypatch)
        it.state_file.hold = True
        it.second.fault(DiskOp.WRITE, errno.EIO)
        await it.guest_does(partial(it.guest.write_now, 0, pattern(1)))
        await until(it.state_file.reached.is_set)
        await until(lambda: bool(looks))
        it.state_file.release.set()

    play(scene, tmp_path, monkeypatch)


def test_a_steady_mirror_is_not_called_inconsistent_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R22: if the source is lost, that word decides whether anybody goes on from the destination."""

    async def scene(it: Stage) -> None:
        monkeypatch.setattr(record_keeper, "RETRY_S", 0.01)
        it.state_file.hold = True  # the record of the start
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(it.attach)
            await until(it.state_file.reached.is_set)
            prepare = it.state_file.prepare
            monkeypatch.setattr(it.state_file, "prepare", full)
            it.state_file.release.set()
        with anyio.fail_after(WAIT_S):
            while "No space" not in ((await it.mirror.status()).last_error or ""):
                await anyio.sleep(0.005)
        assert it.record().peer_worth is Worth.INCONSISTENT
        monkeypatch.setattr(it.state_file, "prepare", prepare)
        await until(lambda: it.record().peer_worth is Worth.UP_TO_DATE)

    def full(record: StateRecord) -> Prepared:
        raise StateRecordError("the state record cannot be written: No space left on device")

    play(scene, tmp_path, monkeypatch)


def test_a_destination_that_is_lost_as_soon_as_it_is_attached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R20: whoever changes it afterwards is noticed: it gets a full copy, not what differs."""

    async def scene(it: Stage) -> None:
        await it.steady()
        await it.mirror.cancel(force=False)
        await it.guest_does(partial(it.guest.write_now, 0, pattern(1)))
        mirror_start = it.engine.mirror_start

        async def attach_and_lose(disk: disks.LocalDisk, *, resync: bool, spare_doubt: bool) -> None:
            it.second.fault(DiskOp.WRITE, errno.EIO)
            await mirror_start(disk, resync=resync, spare_doubt=spare_doubt)
            await until(lambda: bool(looks))

        looks = looks_of(monkeypatch)
        monkeypatch.setattr(it.engine, "mirror_start", attach_and_lose)
        await it.mirror.start(MirrorTarget(str(it.paths[1]), cache="writeback"))
        monkeypatch.setattr(it.engine, "mirror_start", mirror_start)
        assert (await it.mirror.status()).full_copy_reason is None
        await anyio.to_thread.run_sync(it.paths[1].write_bytes, bytes(SIZE))
        await it.attach()
        assert "changed since" in ((await it.mirror.status()).full_copy_reason or "")

    play(scene, tmp_path, monkeypatch)


def test_a_lost_destination_that_another_lineage_has_taken_is_not_attached_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(it: Stage) -> None:
        await it.steady()
        it.second.fault(DiskOp.WRITE, errno.EIO)
        await it.guest_does(partial(it.guest.write_now, 0, pattern(1)))
        await it.guest_does(it.guest.flush_now)  # behind the record
        await until(lambda: it.mirror.state is MirrorState.DEGRADED and not it.mirror.fenced)
        before = it.record()
        monkeypatch.setattr(it.state_file, "other_record", lambda _disk: tmp_path / "other.record.json")
        with pytest.raises(MirrorError, match=r"another state record by now, .*other\.record\.json"):
            await it.mirror.resume()
        assert it.record() == before and it.mirror.state is MirrorState.DEGRADED
        it.paths[1].write_bytes(b"QFI\xfb\x00\x00\x00\x03".ljust(SIZE, b"\0"))
        with pytest.raises(DiskError, match="holds something that would be lost: qcow2"):
            await it.mirror.start(MirrorTarget(str(it.paths[1]), cache="writeback"))  # it is another guest's
        await it.mirror.start(MirrorTarget(str(it.paths[1]), cache="writeback", force=True))
        await until(lambda: it.mirror.state is MirrorState.STEADY)

    play(scene, tmp_path, monkeypatch)


def test_a_switch_that_is_interrupted_lends_the_marks_memory_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the midst of a switch: whoever holds the exception holds nothing that the end needs."""

    async def scene(it: Stage) -> None:
        it.state_file.lock(1)
        await it.steady()
        it.second.hold(DiskOp.WRITE)
        await it.guest_does(partial(it.guest.write_now, 0, pattern(1)))
        prepared = it.state_file.announce(it.record(), it.record().switched(keep_mirror=True))
        interrupted: list[BaseException] = []

        async def switch() -> None:
            try:
                await it.engine.gate_and_exchange(60_000_000, prepared.mark, keep_mirror=True)
            except BaseException as error:
                interrupted.append(error)
                raise

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(switch)
            while not (await it.engine.snapshot()).gated:
                await anyio.sleep(0.005)
            tasks.cancel_scope.cancel()
        assert interrupted
        prepared.discard()
        it.state_file.close()  # BufferError: "cannot close exported pointers exist"

    play(scene, tmp_path, monkeypatch)


def test_a_lost_destination_is_recorded_while_the_bitmap_is_being_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both need the record, which cannot be written: flushes fail, as is promised, and do not hang."""

    async def scene(it: Stage) -> None:
        await it.steady()
        voided = anyio.Event()

        async def bitmap_void() -> None:
            voided.set()

        monkeypatch.setattr(it.engine, "bitmap_void", bitmap_void)
        prepare = it.state_file.prepare

        def fails(record: StateRecord) -> Prepared:
            raise StateRecordError("the state record cannot be written: No space left on device")

        monkeypatch.setattr(it.state_file, "prepare", fails)
        lost = EngineEvent(
            kind=EventKind.BITMAP_FAILED, error=errno.EIO, value=0, offset=0, length=0, attachment=0, queue=0,
            reason=0, role="source", op="write", differed=False,
        )  # fmt: skip
        it.mirror._keeper._on_event(lost)
        await anyio.wait_all_tasks_blocked()
        it.second.fault(DiskOp.WRITE, errno.EIO, count=-1)
        await it.guest_does(partial(it.guest.write_now, 0, pattern(1)))
        flush = await it.guest_does(it.guest.flush_now)
        assert flush.status == Status.IOERR
        monkeypatch.setattr(it.state_file, "prepare", prepare)
        await until(lambda: it.record().peer_worth is Worth.OUTDATED)
        with anyio.fail_after(WAIT_S):
            await voided.wait()
        await until(lambda: it.mirror.state is MirrorState.DEGRADED)
        while (await it.engine.snapshot()).record_pending:
            await anyio.sleep(0.005)
        flush = await it.guest_does(it.guest.flush_now)
        assert flush.ok

    play(scene, tmp_path, monkeypatch)
