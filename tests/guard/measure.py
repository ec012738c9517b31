# SPDX-License-Identifier: Apache-2.0
"""What a request takes: `guard-push` run with two numbers of batches, and the difference divided."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

FEW, MANY = 20, 220
BATCH = 32
TRACE_FEW, TRACE_MANY = 10, 60

_CALL = re.compile(r"^(\d+) +(?:<\.\.\. )?(\w+)(?:\(| resumed)")


def program(name: str) -> Path:
    """Beside the extension of this tree's editable build; tests fail without it."""
    extension = importlib.util.find_spec("vhostsync._shim")
    assert extension is not None and extension.origin is not None, "the extension is not built"
    return Path(extension.origin).parent.parent / "tests" / "guard" / name


def push(work: str, batches: int, *before: str, name: str = "guard-push") -> dict[str, int]:
    command = [*before, str(program(name)), work, str(batches)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
    figures: dict[str, int] = json.loads(done.stdout)
    assert figures["requests"] == batches * BATCH
    return figures


def per_request(work: str) -> dict[str, float]:
    """By the engine's own counts, and malloc's. The least of three: a busy machine adds a sleep now and then,
    and takes nothing away."""

    def once() -> dict[str, float]:
        few, many = push(work, FEW), push(work, MANY)
        return {name: (many[name] - few[name]) / (many["requests"] - few["requests"]) for name in many}

    runs = [once() for _ in range(3)]
    return {name: min(run[name] for run in runs) for name in runs[0]}


def kernel_syscalls_per_request(work: str, folder: Path) -> float | None:
    """As the kernel sees the engine's thread; None: nothing here may be traced."""

    def count(batches: int) -> int:
        output = folder / f"strace-{batches}"
        thread = push(work, batches, "strace", "-f", "-o", str(output))["engine_thread"]
        calls = (_CALL.match(line) for line in output.read_text().splitlines())
        # A call that another thread's line has interrupted is shown twice: count its end once.
        return sum(1 for call in calls if call and int(call[1]) == thread and " resumed" not in call[0])

    if (
        shutil.which("strace") is None
        or subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode
    ):
        return None
    return (count(TRACE_MANY) - count(TRACE_FEW)) / ((TRACE_MANY - TRACE_FEW) * BATCH)


def instructions_per_request(work: str, folder: Path) -> float | None:
    """Of the engine's thread outside the kernel, as callgrind counts them; None: no valgrind. It cannot
    run io_uring and a guest's thread side by side, so `guard-count` does without io_uring."""

    def count(batches: int) -> int:
        output = folder / f"callgrind-{work}-{batches}"
        options = ("--tool=callgrind", "--separate-threads=yes", f"--callgrind-out-file={output}")
        push(work, batches, "valgrind", "--quiet", *options, name="guard-count")
        # Thread 01 is the guest's; beside the engine's there are its disks', which have nothing to do.
        totals = [
            int(found[1])
            for thread in folder.glob(f"{output.name}-*")
            if not thread.name.endswith("-01")
            and (found := re.search(r"^totals: (\d+)$", thread.read_text(), re.MULTILINE))
        ]
        assert totals, "callgrind has counted nothing in the engine's thread"
        return sum(totals)

    if shutil.which("valgrind") is None:
        return None
    return (count(MANY) - count(FEW)) / ((MANY - FEW) * BATCH)
