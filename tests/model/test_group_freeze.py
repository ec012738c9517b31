# SPDX-License-Identifier: Apache-2.0
"""One disk of a group with `--group-freeze`, whose only other disk is played: what holds its guest, what its
record says, and which of its commands go before a group that would let go."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.engine_driver import DiskOp
from tests.model.rig import BLOCK, pattern
from tests.model.stage import Stage, play, until
from tests.model.test_group_member import FullFileSystem
from vhostsync.errors import MirrorError
from vhostsync.mirror import group_member, mirror
from vhostsync.mirror.group_cut import CutStep
from vhostsync.mirror.group_member import GroupMember
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.record.names import Member
from vhostsync.record.state_record import Worth

OWN = ("vm1", "data.record.json")


class PlayedOther:
    """Lets go when it is told to, once `answers` is set; or `refuses`."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.refuses = False
        self.answers = anyio.Event()
        self.answers.set()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Mapping[str, PlayedOther]]:
        yield {"other": self}

    async def cut(self, step: CutStep) -> Any:
        self.steps.append(step)
        await self.answers.wait()
        if self.refuses:
            raise MirrorError("not now")
        return {"loss": "5eed", "cut": None} if step == "let-go" else {}


def in_group(
    scene: Callable[[Stage, PlayedOther], Awaitable[None]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def perform(it: Stage) -> None:
        other = PlayedOther()
        it.mirror.group_cut.join(Member(*OWN), other)
        await it.steady()
        await it.guest_does(partial(it.guest.write_now, 0, pattern(1)))
        await scene(it, other)

    play(perform, folder, monkeypatch)


@asynccontextmanager
async def member(it: Stage, *, is_there: bool = True) -> AsyncIterator[GroupMember]:
    async with anyio.create_task_group() as tasks:
        yield GroupMember(it.mirror, tasks, lambda: is_there)


async def lose(it: Stage) -> None:
    it.second.fault(DiskOp.WRITE, errno.EIO, count=-1)
    assert (await it.guest_does(partial(it.guest.write_now, BLOCK, pattern(2)))).ok
    await until(lambda: it.mirror.state is MirrorState.DEGRADED)


async def is_cut(it: Stage) -> None:
    await until(lambda: it.record().cut is not None)
    assert it.record().peer_worth is Worth.OUTDATED and it.record().wanted is None


@pytest.mark.parametrize("by", ["its own loss", "the group"])
def test_no_flush_is_confirmed_before_all_have_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    async def scene(it: Stage, other: PlayedOther) -> None:
        other.answers = anyio.Event()
        async with member(it) as asked:
            if by == "the group":
                await asked.cut("ask", *OWN)
                assert (await asked.cut("let-go", *OWN))["cut"] is None
            else:
                await lose(it)
            flush = it.guest.flush()
            await until(lambda: other.steps == ["ask"])
            assert (await it.engine.snapshot()).record_pending
            await it.guest_does(it.guest.poll)
            assert it.record().peer_worth is Worth.UP_TO_DATE and not flush.done
            other.answers.set()
            await it.guest_does(partial(it.guest.wait, flush))
            await is_cut(it)
            assert other.steps == ["ask", "let-go"]
            answer = await asked.cut("let-go", *OWN)
            assert answer["cut"] == it.record().cut, "who asks late is told"

    in_group(scene, tmp_path, monkeypatch)


def test_who_has_given_up_is_no_part_though_that_is_not_recorded_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(it: Stage, other: PlayedOther) -> None:
        other.refuses = it.state_file.hold = True
        await lose(it)
        async with member(it) as asked:
            assert await it.guest_does(partial(it.state_file.reached.wait, 5))
            for step in ("ask", "let-go"):
                with pytest.raises(MirrorError, match="not steady"):
                    await asked.cut(step, *OWN)
        it.state_file.release.set()
        await until(lambda: it.record().peer_worth is Worth.OUTDATED)
        assert it.record().cut is None and it.record().wanted is not None
        error = (await it.mirror.status()).last_error
        assert error == "the destinations of the group are no consistent set: other: not now"

    in_group(scene, tmp_path, monkeypatch)


def test_a_cancel_lets_all_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(it: Stage, other: PlayedOther) -> None:
        await it.mirror.cancel(force=False)
        await is_cut(it)
        assert other.steps == ["ask", "let-go"] and it.mirror.state is MirrorState.PASSTHROUGH
        assert it.second.read(0, BLOCK) == pattern(1)

    in_group(scene, tmp_path, monkeypatch)


def test_a_forced_end_lets_nobody_else_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could ask this one any more. A restart resumes its mirror."""

    async def scene(it: Stage, other: PlayedOther) -> None:
        it.mirror.group_cut.part()
        await it.mirror.abandon()
        assert it.record().peer_worth is Worth.OUTDATED
        assert it.record().cut is None and it.record().wanted is not None and not other.steps
        async with member(it) as asked:
            with pytest.raises(MirrorError, match="or ends"):
                await asked.cut("ask", *OWN)

    in_group(scene, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("meant", "why"),
    [
        (("vm2", OWN[1]), "serves data.record.json of the group vm1, and not .* of the group vm2; give each"),
        ((OWN[0], "other.record.json"), "and not other.record.json of the group vm1; give each state"),
        ((None, None), "does not say which disk it means, as older versions do; bring all backends"),
        ((OWN[0], None), "does not say which disk it means"),
        ((None, OWN[1]), "does not say which disk it means"),
    ],
)
def test_who_means_another_disk_or_does_not_say_which_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meant: tuple[str | None, str | None], why: str
) -> None:
    async def scene(it: Stage, other: PlayedOther) -> None:
        async with member(it) as asked:
            for step in ("ask", "let-go"):
                with pytest.raises(MirrorError, match=why):
                    await asked.cut(step, *meant)
        assert it.mirror.state is MirrorState.STEADY and not other.steps

    in_group(scene, tmp_path, monkeypatch)


def test_who_has_asked_and_is_gone_lets_nobody_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(it: Stage, other: PlayedOther) -> None:
        async with member(it, is_there=False) as asked:
            await asked.cut("ask", *OWN)
            with pytest.raises(MirrorError, match="who has asked for it is gone"):
                await asked.cut("let-go", *OWN)
        assert it.mirror.state is MirrorState.STEADY and not other.steps

    in_group(scene, tmp_path, monkeypatch)


@pytest.mark.parametrize("step", ["ask", "let-go"])
def test_another_command_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """A short one is waited for."""

    async def scene(it: Stage, other: PlayedOther) -> None:
        async with member(it) as asked, anyio.create_task_group() as tasks:
            with monkeypatch.context() as hurried:
                hurried.setattr(group_member, "TURN_S", 0.05)
                async with it.mirror.turns.take("resize"):
                    with pytest.raises(MirrorError, match="resize is under way"):
                        await asked.cut(step, *OWN)
            monkeypatch.setattr(group_member, "TURN_S", 10.0)
            async with it.mirror.turns.take("resize"):
                tasks.start_soon(asked.cut, step, *OWN)
                await anyio.wait_all_tasks_blocked()
                assert it.mirror.state is MirrorState.STEADY and not other.steps
        await until(lambda: it.mirror.state is (MirrorState.STEADY, MirrorState.DEGRADED)[step == "let-go"])

    in_group(scene, tmp_path, monkeypatch)


@pytest.mark.parametrize("step", ["ask", "let-go"])
def test_but_not_the_one_by_which_it_lets_go_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """So two that are cancelled at once are one set."""

    async def scene(it: Stage, other: PlayedOther) -> None:
        monkeypatch.setattr(group_member, "TURN_S", 10.0)
        other.answers = anyio.Event()
        it.second.hold(DiskOp.FLUSH)
        async with member(it) as asked, anyio.create_task_group() as tasks:
            tasks.start_soon(partial(it.mirror.cancel, force=False))
            await until(lambda: not it.mirror.turns.is_free)
            tasks.start_soon(asked.cut, step, *OWN)
            await anyio.wait_all_tasks_blocked()
            it.second.release_all()
            await until(lambda: other.steps == ["ask"])
            assert not it.mirror.turns.is_free
            with anyio.fail_after(5):
                await asked.cut(step, *OWN)
            other.answers.set()
        await is_cut(it)
        assert it.mirror.state is MirrorState.PASSTHROUGH

    in_group(scene, tmp_path, monkeypatch)


def test_a_destination_that_lacks_something_is_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest has written there since, by the way, and that is not durable on the destination."""

    async def scene(it: Stage) -> None:
        it.mirror.group_cut.join(Member(*OWN), PlayedOther())
        await it.guest_does(partial(it.guest.write_now, 0, pattern(1)))  # no hole, which is not read
        it.first.spoil(0, BLOCK)
        await it.steady()
        async with member(it) as asked:
            with pytest.raises(MirrorError, match="the destination lacks what could not be read"):
                await asked.cut("ask", *OWN)
            it.second.hold(DiskOp.FLUSH)
            await it.guest_does(partial(it.guest.write_now, 0, pattern(2)))
            await asked.cut("ask", *OWN)
            with pytest.raises(MirrorError, match="its destination was no copy"):
                await asked.cut("let-go", *OWN)
        await until(lambda: it.record().peer_worth is Worth.OUTDATED)
        assert it.record().cut is None and it.record().wanted is not None
        assert "its destination was no copy" in str((await it.mirror.status()).last_error)

    play(scene, tmp_path, monkeypatch)


def test_a_mirror_that_is_resumed_while_a_cut_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays a copy."""

    async def scene(it: Stage, other: PlayedOther) -> None:
        other.answers = anyio.Event()
        refused: list[MirrorError] = []

        async def resume() -> None:
            try:
                await it.mirror.resume()
            except MirrorError as error:
                refused.append(error)

        await lose(it)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(resume)
            await until(lambda: not it.mirror.turns.is_free)
            await until(lambda: other.steps == ["ask"])
            other.answers.set()
        await is_cut(it)
        assert "not wanted any more" in str(refused[0])
        assert it.mirror.state is MirrorState.DEGRADED

    in_group(scene, tmp_path, monkeypatch)


@pytest.mark.parametrize("by", ["its own loss", "the group"])
def test_a_start_while_the_others_are_asked_is_told_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    async def scene(it: Stage, other: PlayedOther) -> None:
        monkeypatch.setattr(mirror, "FENCE_WAIT_S", 0.1)
        other.answers = anyio.Event()
        async with member(it) as asked:
            if by == "the group":
                await asked.cut("let-go", *OWN)
            else:
                await lose(it)
            await until(lambda: other.steps == ["ask"])
            with pytest.raises(MirrorError, match=r"of the group have not answered yet.* 5 s at most: start"):
                await it.attach()
            other.answers.set()
        await is_cut(it)
        if by == "the group":
            await it.attach()

    in_group(scene, tmp_path, monkeypatch)


def test_a_start_while_the_loss_cannot_be_recorded_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(it: Stage, _: PlayedOther) -> None:
        monkeypatch.setattr(mirror, "FENCE_WAIT_S", 0.1)
        with monkeypatch.context() as broken:
            broken.setattr(it.state_file, "_files", FullFileSystem())
            await lose(it)
            assert not (await it.guest_does(it.guest.flush_now)).ok
            with pytest.raises(MirrorError, match=r"cannot be written \(see last-error\); mend that first"):
                await it.attach()
        await is_cut(it)

    in_group(scene, tmp_path, monkeypatch)


def test_a_start_while_the_records_disk_hangs_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(it: Stage, _: PlayedOther) -> None:
        monkeypatch.setattr(mirror, "FENCE_WAIT_S", 0.1)
        it.state_file.hold = True
        await lose(it)
        assert await it.guest_does(partial(it.state_file.reached.wait, 5))
        with pytest.raises(MirrorError, match="the disk that the record is kept on does not answer"):
            await it.attach()
        it.state_file.release.set()
        await is_cut(it)

    in_group(scene, tmp_path, monkeypatch)


def test_a_cut_that_cannot_be_recorded_fails_flushes_until_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(it: Stage, other: PlayedOther) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(it.state_file, "_files", FullFileSystem())
            await lose(it)
            assert not (await it.guest_does(it.guest.flush_now)).ok
            assert it.record().cut is None
        await is_cut(it)
        async with member(it) as asked:
            assert (await asked.cut("let-go", *OWN))["cut"] == it.record().cut

    in_group(scene, tmp_path, monkeypatch)


def test_a_mirror_that_is_started_again_is_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is steady; then it lets go anew, and that is another cut."""

    async def scene(it: Stage, other: PlayedOther) -> None:
        await it.mirror.cancel(force=False)
        first = it.record().cut
        it.second.hold(DiskOp.FLUSH)
        async with member(it) as asked, anyio.create_task_group() as tasks:
            tasks.start_soon(it.attach)
            await until(lambda: it.mirror.state is MirrorState.SYNCING)
            assert it.record().cut is None
            for step in ("ask", "let-go"):
                with pytest.raises(MirrorError, match="not steady"):
                    await asked.cut(step, *OWN)
            it.second.release_all()
            await until(lambda: it.mirror.state is MirrorState.STEADY)
            await asked.cut("let-go", *OWN)
        await is_cut(it)
        assert it.record().cut != first

    in_group(scene, tmp_path, monkeypatch)


def test_without_the_option_nothing_is_let_go_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(it: Stage) -> None:
        await it.steady()
        async with member(it) as asked:
            for step in ("ask", "let-go"):
                with pytest.raises(MirrorError, match="not started with --group-freeze"):
                    await asked.cut(step, *OWN)
        assert it.mirror.state is MirrorState.STEADY

    play(scene, tmp_path, monkeypatch)
