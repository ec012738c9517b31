# SPDX-License-Identifier: Apache-2.0
"""What a request takes: `guard-push` run with two numbers of batches, and the difference divided."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

FEW, MANY = 20, 220
BATCH = 32
TRACE_FEW, TRACE_MANY = 10, 60
RUNS_MAX = 12

_CALL = re.compile(r"^(\d+) +(?:<\.\.\. )?(\w+)(?:\(| resumed)")


def program(name: str) -> Path:
    """Beside the extension of this tree's editable build; tests fail without it."""
    extension = importlib.util.find_spec("vhostsync._shim")
    assert extension is not None and extension.origin is not None, "the extension is not built"
    return Path(extension.origin).parent.parent / "tests" / "guard" / name


def push(work: str, batches: int, *before: str, name: str = "guard-push") -> dict[str, int]:
    command = [*before, str(program(name)), work, str(batches)]
    if work.endswith("-lent"):
        # Threads that share a processor meet in one order. On two, how often one wakes the other is the
        # machine's choice.
        command[:0] = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
    figures: dict[str, int] = json.loads(done.stdout)
    assert figures["requests"] == batches * BATCH
    return figures


def least(measure: Callable[[], dict[str, float]], bounds: dict[str, float]) -> dict[str, float]:
    """The least of each figure in runs until all keep their bounds, at most RUNS_MAX. What a request takes is
    the same in each; where others run, threads meet later and sleep oftener. That adds calls to a run and
    takes none away."""
    found = measure()
    for _ in range(RUNS_MAX - 1):
        if all(found[name] <= bound for name, bound in bounds.items() if name in found):
            break
        found = {name: min(found[name], figure) for name, figure in measure().items()}
    return found


def per_request(work: str) -> dict[str, float]:
    """By the engine's own counts, and malloc's."""
    few, many = push(work, FEW), push(work, MANY)
    return {name: (many[name] - few[name]) / (many["requests"] - few["requests"]) for name in many}


def can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    done = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False)
    return done.returncode == 0


def kernel_syscalls_per_request(work: str, folder: Path) -> dict[str, float]:
    """As the kernel sees the engine's thread."""

    def count(batches: int) -> int:
        output = folder / f"strace-{batches}"
        thread = push(work, batches, "strace", "-f", "-o", str(output))["engine_thread"]
        calls = (_CALL.match(line) for line in output.read_text().splitlines())
        # A call that another thread's line has interrupted is shown twice: count its end once.
        return sum(1 for call in calls if call and int(call[1]) == thread and " resumed" not in call[0])

    calls = count(TRACE_MANY) - count(TRACE_FEW)
    return {"kernel-syscalls": calls / ((TRACE_MANY - TRACE_FEW) * BATCH)}


def instructions_per_request(work: str, folder: Path) -> float | None:
    """Of the engine's thread outside the kernel, as callgrind counts them; None: no valgrind. It cannot
    run io_uring and a guest's thread side by side, so `guard-count` does without io_uring."""

    def count(batches: int) -> int:
        output = folder / f"callgrind-{work}-{batches}"
        options = ("--tool=callgrind", "--separate-threads=yes", f"--callgrind-out-file={output}")
        push(work, batches, "valgrind", "--quiet", *options, name="guard-count")
        # -01 is the guest's. Which of the others is the engine's depends on which thread was started first:
        # it is the one that works.
        others = [file for file in folder.glob(f"{output.name}-*") if not file.name.endswith("-01")]
        totals = [re.search(r"^totals: (\d+)$", file.read_text(), re.MULTILINE) for file in others]
        counted = [int(total[1]) for total in totals if total]
        assert counted, "callgrind has counted nothing in the engine's thread"
        return max(counted)

    if shutil.which("valgrind") is None:
        return None
    return (count(MANY) - count(FEW)) / ((MANY - FEW) * BATCH)
