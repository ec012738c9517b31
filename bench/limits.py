# SPDX-License-Identifier: Apache-2.0
"""Rows L: how exactly a limit is kept, by ours and by the rival's throttle filter, in turn. A limit is an
average rate, so what others do on the machine meanwhile makes little difference, as long as the guest wants
more than it may have."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from bench.contenders import Backend, Ours, Rival
from bench.files import make_file
from bench.plan import Plan
from bench.sample import Round, Sample, Work

MIB = 1 << 20
SECONDS_MIN = 10.0
RAMP_S = 2.0  # what a bucket lets go at once is gone by then
LIMITS = {4096: {"iops": 100, "bps": MIB // 2}, MIB: {"iops": 20, "bps": 20 * MIB}}
"""By the size of a request: what a guest of depth 1 exceeds on any machine, also one that is busy."""
_RIVALS_NAME = {"iops": "iops-total", "bps": "bps-total"}


@contextlib.contextmanager
def _limited(plan: Plan, kind: str, rate: int) -> Iterator[dict[str, Backend]]:
    folder = plan.directory_of["memory"] / f"vhostsync-bench-limits-{os.getpid()}"
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        file = make_file(folder / "disk.img", 64 * MIB, direct=False)
        ours = Ours("ours", folder, file, direct=False, options=(f"--limit-{kind}", str(rate)))
        stack.callback(ours.close)
        rival = _rival(folder, file, kind, rate)
        stack.callback(rival.close)
        yield {"ours": ours, "rival": rival}


def _rival(folder: Path, file: Path, kind: str, rate: int) -> Rival:
    group = {"qom-type": "throttle-group", "id": "limits", "limits": {_RIVALS_NAME[kind]: rate}}
    below = {
        "driver": "file", "filename": str(file), "aio": "threads", "locking": "off",
        "cache": {"direct": False, "no-flush": False},
    }  # fmt: skip
    source = {"driver": "throttle", "throttle-group": "limits", "file": below}
    return Rival("rival", folder, source, direct=False, objects=(json.dumps(group),))


def measure_limit(plan: Plan, work: Work, kind: str) -> list[Round]:
    """How far from the limit, in percent, either way."""
    rate = LIMITS[work.block_bytes][kind]
    allowed_per_s = rate if kind == "iops" else rate / work.block_bytes
    rounds: list[Round] = []
    with _limited(plan, kind, rate) as running:
        for number in range(plan.pairs):
            samples: Round = {}
            for name in sorted(running, reverse=number % 2 == 1):
                sample = running[name].measure(work, max(plan.seconds, SECONDS_MIN), RAMP_S)
                off = abs(sample.figures["per_s"] / allowed_per_s - 1) * 100
                samples[name] = Sample({**sample.figures, "off_percent": off}, sample.detail)
            rounds.append(samples)
    return rounds
