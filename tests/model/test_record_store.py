# SPDX-License-Identifier: Apache-2.0
"""The policy over a record that lies elsewhere (remote_store.py): changes that time out and have been made or
not, that arrive late, that are refused, and somebody else who changes the record. Driven by hypothesis
through the real Mirror (so RecordKeeper and Switch) over the real engine, on disks that lose what was not
flushed.

After every step, of whatever the record is or could be the next moment:
  * after a power cut the disk that it names has all that was flushed, and so has a peer that it calls up to
    date;
  * after a kill the disk that it names has all that was confirmed (once no change is in doubt);
  * no more than one disk may serve.
And once somebody else has changed it, it is not changed any more, and each writer says why.

VHOSTSYNC_STORE_EXAMPLES plays longer."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.engine_driver import DiskOp
from tests.frontend import Request
from tests.model import test_policy
from tests.model.random_guest import BLOCKS, SPREAD
from tests.model.remote_store import Outcome, RemoteStore, Server
from tests.model.rig import BLOCK, pattern
from tests.model.stage import until
from tests.model.test_policy import Run, World, disks_in, run_of
from vhostsync.errors import (
    MirrorError,
    StateRecordError,
    SupersededError,
    SwitchError,
    UnsettledRecordError,
    VhostsyncError,
)
from vhostsync.mirror import record_keeper
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror_target import MirrorTarget
from vhostsync.record.record_store import RecordStore
from vhostsync.record.state_record import StateRecord, Worth
from vhostsync.record.who_may_serve import check_start

EXAMPLES = int(os.environ.get("VHOSTSYNC_STORE_EXAMPLES", "15"))
PATIENCE_S = 20.0
MOMENT_S = 0.01


class RemoteWorld(World):
    """The record is on a server."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.server = Server()
        self.run: Run | None = None
        self.taken_over = 0  # the server's revision since then

    def open_store(self) -> RecordStore:
        return RemoteStore(self.server)

    def end_the_stores_faults(self, store: RecordStore) -> None:
        self.server.coming.clear()
        self.server.under_way.clear()

    def record(self) -> StateRecord:
        assert self.server.value is not None
        return self.server.value.record

    def check(self) -> None:
        if self.run is not None:
            self.run.guest.listen()
            if self.server.value is not None and not self.run.store.late and not self.taken_over:
                self._check_kill(dict(self.run.guest.done), self.server.value.after_a_kill())
        for value in self.server.possible():
            self.check_named(value.record)
            for record in (value.record, value.after_a_kill()):
                assert [disk for disk in record.disks if may_serve(record, disk)] == [record.current]
        if self.taken_over:
            assert self.server.revision == self.taken_over, "somebody else's record was changed"

    def _check_kill(self, confirmed: dict[int, int], record: StateRecord) -> None:
        disk = self.held[Path(record.current.path)]
        for block, seed in confirmed.items():
            kept = self.allowed[block]
            newer = kept[kept.index(seed):] if seed in kept else kept
            found = disk.read(block * SPREAD * BLOCK, BLOCK)
            assert any(found == pattern(each) for each in newer), (
                f"{record.current.path} lacks the confirmed write {seed} of block {block}: {found[:8]!r}"
            )


def may_serve(record: StateRecord, disk: Any) -> bool:
    try:
        check_start(record, disk)
    except StateRecordError:
        return False
    return True


def world_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> RemoteWorld:
    monkeypatch.setattr(record_keeper, "RETRY_S", 0.01)
    options = {"destination_timeout_s": 10.0, **options}
    return RemoteWorld(folder, random.Random(0), disks_in(folder, monkeypatch), options, None, False)


outcomes = st.lists(st.sampled_from(list(Outcome)), min_size=1, max_size=3)
disk_names = st.sampled_from("abc")


class RemoteRecord(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.folder = tempfile.TemporaryDirectory()
        self.world = world_of(Path(self.folder.name), self.patch)
        self.portal_context = start_blocking_portal("asyncio")
        self.portal = self.portal_context.__enter__()
        self._start(next(iter(self.world.held)))

    def _start(self, path: Path) -> None:
        self.world.killed = False
        self.serving = self.portal.wrap_async_context_manager(run_of(self.world, path, resume=False))
        self.run, _ = self.serving.__enter__()
        self.world.run = self.run

    def teardown(self) -> None:
        if not hasattr(self, "run"):
            return
        try:
            try:
                self.portal.call(self._come_to_rest)
            finally:
                self.world.killed = bool(self.world.taken_over)
                self.world.run = None
                self.serving.__exit__(None, None, None)
        finally:
            self.portal_context.__exit__(None, None, None)
            for disk in self.world.held.values():
                disk.drop()
            self.patch.undo()
            self.folder.cleanup()

    async def _come_to_rest(self) -> None:
        if self.world.taken_over:
            await self._confirm_nothing_alone()
        else:
            async with anyio.create_task_group() as tasks:
                await test_policy.settle(self.run, tasks)

    async def _confirm_nothing_alone(self) -> None:
        """The destination is lost to whoever was superseded: no flush is confirmed without it."""
        self.world.end_the_stores_faults(self.run.store)
        if self.run.mirror.state is MirrorState.STEADY:
            await self._try(partial(self.run.mirror.cancel, force=True), SupersededError)

    async def _try(self, do: Callable[[], Awaitable[Any]], *errors: type[VhostsyncError]) -> None:
        with anyio.fail_after(PATIENCE_S):
            try:
                await do()
            except VhostsyncError as error:
                self.world.story.append(str(error))
                assert not errors or isinstance(error, errors), error
            else:
                assert not errors, "it was obeyed"

    def _path(self, name: str) -> Path:
        return self.run.world.folder / f"{name}.img"

    # ---- what happens ----------------------------------------------------------------

    @rule(blocks=st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=4, unique=True))
    def write(self, blocks: list[int]) -> None:
        for block in blocks:
            self.portal.call(self.run.guest.write, block)

    @rule()
    def flush(self) -> None:
        self.portal.call(self.run.guest.flush)

    @rule(coming=outcomes)
    def the_store_will(self, coming: list[Outcome]) -> None:
        self.world.server.coming.extend(coming)

    @rule(index=st.integers(0, 7))
    def a_change_arrives_late(self, index: int) -> None:
        if self.world.server.under_way:
            self.world.server.land(index % len(self.world.server.under_way))

    @rule(name=disk_names, full=st.booleans())
    def start_mirror(self, name: str, full: bool) -> None:
        path = str(self._path(name))
        if path != self.run.mirror.source_path:
            target = MirrorTarget(path, cache="writeback", full=full)
            self.portal.call(self._try, partial(self.run.mirror.start, target))

    @rule()
    def become_steady(self) -> None:
        self.portal.call(self._become_steady)

    async def _become_steady(self) -> None:
        with anyio.fail_after(PATIENCE_S):
            while self.run.mirror.state is MirrorState.SYNCING:
                await anyio.sleep(0.002)

    @rule(keep=st.booleans(), step_by_step=st.booleans())
    def switch(self, keep: bool, step_by_step: bool) -> None:
        plan = {"keep_mirror": keep, "accept_unreadable": step_by_step}
        switch = partial(self.run.mirror.switch, deadline_s=5.0, max_pause_ms=1000, **plan)
        self.portal.call(self._try, switch)

    @rule(force=st.booleans())
    def cancel(self, force: bool) -> None:
        self.portal.call(self._try, partial(self.run.mirror.cancel, force=force))

    @rule(op=st.sampled_from([DiskOp.WRITE, DiskOp.FLUSH]), count=st.sampled_from([1, 3]))
    def the_destination_fails(self, op: DiskOp, count: int) -> None:
        path = self.run.mirror.destination_path
        if path is not None:
            self.portal.call(partial(self.world.held[Path(path)].fault, op, 5, count=count))

    @rule()
    def time_passes(self) -> None:
        self.portal.call(anyio.sleep, MOMENT_S)

    @rule()
    def kill_and_restart(self) -> None:
        """With what is under way to the store, which needs to answer for a start."""
        if self.world.taken_over:
            return
        self.world.killed = True
        self.world.run = None
        self.serving.__exit__(None, None, None)
        self.world.server.coming.clear()
        assert self.world.server.value is not None
        self._start(Path(self.world.server.value.after_a_kill().current.path))

    @rule()
    def take_over(self) -> None:
        """By somebody who may: its destination is up to date. Once; whether it was is a matter of time, so it
        is none of what hypothesis may choose by."""
        if self.world.taken_over:
            return
        value, server = self.world.server.value, self.world.server
        assert value is not None
        if value.former is None and value.record.peer_worth is Worth.UP_TO_DATE:
            assert value.record.peer is not None
            server.put(value.record.promoted(value.record.peer))
            self.world.taken_over = server.revision

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "run"):
            self.portal.call(self.world.check)


TestRemoteRecord = RemoteRecord.TestCase
TestRemoteRecord.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=30, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestRemoteRecord = pytest.mark.timeout(600)(TestRemoteRecord)


# ---- one case each ---------------------------------------------------------------------------------


@asynccontextmanager
async def steady(world: RemoteWorld) -> AsyncIterator[Run]:
    """A mirror from a.img to b.img, and the record says so."""
    async with run_of(world, world.folder / "a.img", resume=False) as (run, _):
        await run.mirror.start(MirrorTarget(str(world.folder / "b.img"), cache="writeback"))
        try:
            await until(lambda: world.record().peer_worth is Worth.UP_TO_DATE)
            yield run
        finally:
            world.killed = True


def play(
    scene: Callable[[RemoteWorld, Run], Awaitable[None]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def perform() -> None:
        world = world_of(folder, monkeypatch)
        async with steady(world) as run:
            await scene(world, run)
        for disk in world.held.values():
            disk.drop()

    anyio.run(perform)


async def run_until_done(run: Run, request: Request) -> None:
    with anyio.fail_after(PATIENCE_S):
        while not request.done:
            run.guest.frontend.poll()
            await anyio.sleep(0.002)


async def answered(run: Run) -> None:
    with anyio.fail_after(PATIENCE_S):
        while not run.guest.is_idle():
            run.guest.listen()
            await anyio.sleep(0.002)


@pytest.mark.parametrize("outcome", [Outcome.LOST, Outcome.UNDER_WAY, Outcome.DONE])
def test_a_change_in_doubt_is_followed_by_the_record_that_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    """A mirror-start that was refused for it leaves no peer for a restart to resume."""

    async def scene(world: RemoteWorld, run: Run) -> None:
        await run.mirror.cancel(force=True)
        before = world.record()
        world.server.coming.append(outcome)
        with pytest.raises(UnsettledRecordError):
            await run.mirror.start(MirrorTarget(str(world.folder / "c.img"), cache="writeback"))
        await until(lambda: not run.store.late)
        assert world.record() == before
        while world.server.under_way:
            world.server.land(0)
        assert world.record() == before

    play(scene, tmp_path, monkeypatch)


def test_no_flush_is_confirmed_while_it_is_in_doubt_whether_the_destination_is_outdated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(world: RemoteWorld, run: Run) -> None:
        world.server.coming.extend([Outcome.LOST, Outcome.UNDER_WAY] * 10_000)
        world.held[world.folder / "b.img"].fault(DiskOp.WRITE, errno.EIO, count=-1)
        run.guest.write(0)
        (write,) = run.guest.writes
        await until(lambda: run.mirror.state is MirrorState.DEGRADED)
        flush = run.guest.frontend.flush()
        await run_until_done(run, flush)
        assert write.ok and not flush.ok and world.record().peer_worth is Worth.UP_TO_DATE
        world.server.coming.clear()
        await until(lambda: world.record().peer_worth is Worth.OUTDATED)

    play(scene, tmp_path, monkeypatch)


@pytest.mark.parametrize("made", [Outcome.UNDER_WAY, Outcome.DONE])
@pytest.mark.parametrize("put_back", [Outcome.ANSWERED, Outcome.LOST])
def test_a_switch_whose_change_is_in_doubt_leaves_the_guest_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Outcome, put_back: Outcome
) -> None:
    """And the record follows, as soon as it can."""

    async def scene(world: RemoteWorld, run: Run) -> None:
        named: list[str] = []
        ungate = run.engine.ungate

        async def note_and_ungate() -> None:
            named.append(world.record().current.path)
            await ungate()

        monkeypatch.setattr(run.engine, "ungate", note_and_ungate)
        world.server.coming.extend([Outcome.ANSWERED, made, put_back])  # announced, changed, put back
        with pytest.raises(SwitchError, match="is unknown"):
            await run.mirror.switch(deadline_s=5, max_pause_ms=1000, keep_mirror=False)
        if put_back is Outcome.ANSWERED:
            assert named == [str(world.folder / "a.img")], "the guest goes on before the record is put back"
        world.check()
        run.guest.write(1)
        run.guest.flush()
        await answered(run)
        await until(lambda: not run.store.late)
        while world.server.under_way:
            world.server.land(0)
        world.check()
        assert world.record().current.path == str(world.folder / "a.img")
        assert run.mirror.source_path == str(world.folder / "a.img")
        assert run.mirror.state is MirrorState.STEADY
        await run.mirror.switch(deadline_s=5, max_pause_ms=1000, keep_mirror=False)
        assert world.record().current.path == str(world.folder / "b.img")

    play(scene, tmp_path, monkeypatch)


def test_whoever_is_superseded_changes_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(world: RemoteWorld, run: Run) -> None:
        taken = world.record()
        assert taken.peer is not None
        world.server.put(taken.promoted(taken.peer))
        world.taken_over = world.server.revision
        with pytest.raises(MirrorError, match="changed by somebody else"):
            await run.mirror.switch(deadline_s=5, max_pause_ms=1000, keep_mirror=True)
        with pytest.raises(SupersededError, match="changed by somebody else"):
            await run.mirror.cancel(force=True)
        world.held[world.folder / "b.img"].fault(DiskOp.WRITE, errno.EIO, count=-1)
        run.guest.write(0)
        await until(lambda: run.mirror.state is MirrorState.DEGRADED)
        flush = run.guest.frontend.flush()
        await run_until_done(run, flush)
        assert not flush.ok, "it is confirmed, and whoever has taken over lacks it"
        world.check()

    play(scene, tmp_path, monkeypatch)


def test_a_start_kills_what_an_earlier_run_has_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the store has changed, and yet it is written before the guest is served."""

    async def scene(world: RemoteWorld, run: Run) -> None:
        world.server.coming.extend([Outcome.ANSWERED, Outcome.UNDER_WAY, *[Outcome.LOST] * 10_000])
        with pytest.raises(SwitchError):
            await run.mirror.switch(deadline_s=5, max_pause_ms=1000, keep_mirror=False)

    async def perform() -> None:
        world = world_of(tmp_path, monkeypatch)
        async with steady(world) as run:
            await scene(world, run)
        world.server.coming.clear()
        world.killed = False
        async with run_of(world, world.folder / "a.img", resume=False) as (run, _):
            for index in reversed(range(len(world.server.under_way))):
                world.server.land(index)
            assert world.record().current.path == str(world.folder / "a.img")
        for disk in world.held.values():
            disk.drop()

    anyio.run(perform)
