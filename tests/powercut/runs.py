# SPDX-License-Identifier: Apache-2.0
"""A scene played, recorded and checked; and a second one on what a power cut has left of it."""

from __future__ import annotations

import logging
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import structlog

from tests.powercut.checker import Checker, Tally
from tests.powercut.loads import initial_content, rubbish
from tests.powercut.machine import STOP_TIMEOUT_S, Remains, Site, blank, decoded, machine
from tests.powercut.media import SECTOR
from tests.powercut.recorder import Moment, Recorder
from tests.powercut.scenes import Scene, play


@contextmanager
def site() -> Iterator[Site]:
    """In memory: the bitmap's file is synced all the time."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="vhs-cut-", dir=memory if memory.is_dir() else None))
    try:
        with quiet():
            yield Site(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def quiet() -> Iterator[None]:
    """The backend's log of thousands of starts is of no use."""
    former = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**former)


def record(where: Site, scene: Scene, remains: Remains, chance: random.Random) -> list[Moment]:
    """Plays the scene on a machine that starts from `remains`."""
    recorder = Recorder()

    async def perform() -> None:
        checkpoint_s = chance.choice((0.002, 0.01, 0.05))
        async with machine(
            where,
            remains,
            recorder,
            features=scene.features,
            remote=scene.remote,
            checkpoint_s=checkpoint_s,
            pull_ahead=scene.pull_ahead,
            switch_on_source_error=scene.failover,
            pause_on_destination_error=scene.pause,
            stop_timeout_s=STOP_TIMEOUT_S if scene.pause else 10,
            congestion_fill_bytes=128 << 10,
            ahead_backoff_s=0.01,
        ) as running:
            await play(running, scene, chance)

    try:
        anyio.run(perform)
        return list(recorder.moments())
    finally:
        recorder.close()


def check_scene(where: Site, scene: Scene, seed: int, restarts: int, tally: Tally) -> int:
    """How many records were checked. LossError."""
    chance = random.Random(f"{scene.name} {seed}")
    first = scene.capacity_bytes // SECTOR
    remains = replace(blank(initial_content(chance), rubbish(first)), capacity_bytes=scene.capacity_bytes)
    cuts: list[Remains] = []
    checker = Checker(where, chance, restarts, pauses=scene.pause, tally=tally, on_cut=cuts.append)
    checker.walk(record(where, scene, remains, chance), remains)
    if not cuts:
        return 1
    left = _chosen(cuts, scene, chance)
    afterwards = replace(scene, phases=scene.afterwards)
    checker = Checker(where, chance, restarts // 4, pauses=scene.pause, tally=tally)
    checker.walk(record(where, afterwards, left, chance), left)
    return 2


def _chosen(cuts: list[Remains], scene: Scene, chance: random.Random) -> Remains:
    def is_telling(left: Remains) -> bool:
        found = decoded(left.record, left.boot)
        return found is not None and scene.telling(found)

    return chance.choice([left for left in cuts if is_telling(left)] or cuts)
