# SPDX-License-Identifier: Apache-2.0
"""The worst day: the source is gone, and what an operator has is one path and no backend."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

from tests.daemon.rig import BLOCK, Served, block_of, flush, image, write_block
from tests.daemon.test_start import refusal
from tests.guest.backends import vhostsync_command


def record(work: Path, *words: str | Path) -> str:
    done = subprocess.run(
        [*vhostsync_command(), "record", *map(str, words)], capture_output=True, text=True, check=True,
        env={**os.environ, "STATE_DIRECTORY": str(work / "state")},
    )  # fmt: skip
    return done.stdout


def record_json(work: Path, disk: Path) -> dict[str, Any]:
    [found] = json.loads(record(work, disk, "--json"))
    assert isinstance(found, dict)
    return found


def test_the_good_copy_is_named_with_the_command_that_goes_on_from_it(work: Path) -> None:
    source, copy = image(work / "a.img"), image(work / "b.img")
    with Served(work, source) as served, served.guest() as guest:
        served.start_mirror(copy)
        write_block(guest, 1, 7)
        flush(guest)
        for disk in (source, copy):
            found = record_json(work, disk)
            assert (found["backend"], found["other"]["worth"]) == (served.process.pid, "up-to-date")
            assert found["next"]["command"] == ["vhostsync", "status", "--control", str(served.control)]
            assert found["current"]["users"] and found["other"]["users"]
        served.kill()
    source.unlink()
    found = record_json(work, source)
    assert (found["current"]["condition"], found["good"]) == ("missing", str(copy))
    command = shlex.join(found["next"]["command"])
    assert command == f"vhostsync serve --blk-file {copy} --promote"
    assert command in record(work, copy) and command in record(work)
    sentence = refusal(work, source)
    assert "does not exist" in sentence and command in sentence and "lacks nothing" in sentence
    with Served(work, copy, "--promote") as served, served.guest() as guest:
        assert guest.read_now(BLOCK, BLOCK) == block_of(1, 7)
        guest.close()
        served.stop()
    assert record_json(work, copy)["superseded"][0]["lost"]


def test_a_record_that_is_forgotten_leaves_nothing(work: Path) -> None:
    disk = image(work / "a.img")
    with Served(work, disk) as served:
        served.stop()
    assert "forgotten: " in record(work, disk, "--forget")
    assert list((work / "state").iterdir()) == []
