# SPDX-License-Identifier: Apache-2.0
"""A mirror-start that is cut off (SIGTERM ends the control socket's commands): it was obeyed, and the record
knows the destination, or nothing is left of it, not even the image that it has made."""

from __future__ import annotations

import threading
from pathlib import Path

import anyio
import pytest

from tests.model.stage import WAIT_S, Stage, play, until
from vhostsync.errors import StateRecordError
from vhostsync.mirror import mirror
from vhostsync.mirror.destination import open_destination
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror_target import MirrorTarget
from vhostsync.record.state_record import Worth
from vhostsync.storage.disk import Disk


def created(it: Stage) -> MirrorTarget:
    it.paths[1].unlink()
    return MirrorTarget(str(it.paths[1]), create=True, cache="writeback")


def test_cut_off_while_the_image_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, go_on = threading.Event(), threading.Event()

    def open_slowly(target: MirrorTarget, *rest: object) -> tuple[Disk, object | None]:
        opened = open_destination(target, *rest)  # type: ignore[arg-type]
        made.set()
        assert go_on.wait(WAIT_S)
        return opened

    async def scene(it: Stage) -> None:
        target = created(it)
        monkeypatch.setattr(mirror, "open_destination", open_slowly)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(it.mirror.start, target)
            await until(made.is_set)
            tasks.cancel_scope.cancel()
            go_on.set()
        assert not it.paths[1].exists()
        assert it.mirror.state is MirrorState.PASSTHROUGH and it.state_file.load() is None
        monkeypatch.setattr(mirror, "open_destination", open_destination)
        await it.mirror.start(target)  # the name is free
        await until(lambda: it.mirror.state is MirrorState.STEADY)

    play(scene, tmp_path, monkeypatch)


def test_cut_off_while_it_waits_for_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(it: Stage) -> None:
        target = created(it)
        async with it.mirror._keeper.lock, anyio.create_task_group() as tasks:
            tasks.start_soon(it.mirror.start, target)
            await until(it.paths[1].exists)
            tasks.cancel_scope.cancel()
        assert not it.paths[1].exists() and it.state_file.load() is None

    play(scene, tmp_path, monkeypatch)


def test_cut_off_once_the_record_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a restart would resume it: so it begins, and the image stays."""

    async def scene(it: Stage) -> None:
        target = created(it)
        it.state_file.hold = True
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(it.mirror.start, target)
            await until(it.state_file.reached.is_set)
            tasks.cancel_scope.cancel()
            it.state_file.release.set()
        with anyio.CancelScope(shield=True):
            await until(lambda: it.mirror.state is MirrorState.STEADY)
            await until(lambda: it.record().peer_worth is Worth.UP_TO_DATE)
        record = it.record()
        assert it.paths[1].exists() and record.wanted is not None and record.wanted.path == str(it.paths[1])

    play(scene, tmp_path, monkeypatch)


def test_one_that_is_refused_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(it: Stage) -> None:
        target = created(it)
        it.paths[0].with_name("record.json.new").mkdir()  # the record cannot be written
        with pytest.raises(StateRecordError, match="cannot be written"):
            await it.mirror.start(target)
        assert not it.paths[1].exists()

    play(scene, tmp_path, monkeypatch)
