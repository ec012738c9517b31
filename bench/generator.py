# SPDX-License-Identifier: Apache-2.0
"""The load generator (loadgen.c): where it is, one run of it, one that goes on beside something else."""

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.sample import BenchError, Work


def find_loadgen() -> Path:
    """The load generator: $VHOSTSYNC_LOADGEN, or where the build of this tree put it."""
    given = (Path(os.environ["VHOSTSYNC_LOADGEN"]),) if "VHOSTSYNC_LOADGEN" in os.environ else ()
    found = _built("loadgen", given)
    if found is None:
        raise BenchError("loadgen is not built; use ./run bench, or meson compile and VHOSTSYNC_LOADGEN=…")
    return found


def find_nbd_loop() -> Path:
    """What writes to an NBD export and does nothing else."""
    found = _built("nbd_loop")
    if found is None:
        raise BenchError("nbd_loop is not built; install libnbd-dev, and build again")
    return found


@functools.cache
def _built(name: str, first: tuple[Path, ...] = ()) -> Path | None:
    places = list(first)
    with contextlib.suppress(ImportError):
        # An editable install uses the extension from its build's directory; the load generator is beside it.
        extension = importlib.util.find_spec("vhostsync._shim")
        if extension is not None and extension.origin is not None:
            places.append(Path(extension.origin).parent.parent / "bench" / name)
    top = Path(__file__).resolve().parent.parent
    places += sorted(top.glob(f"build*/bench/{name}")) + sorted(top.glob(f"build/*/bench/{name}"))
    return next((place for place in places if place.exists()), None)


def _command(sock: Path, work: Work, seconds: float, ramp: float, *options: str) -> list[str]:
    command = [
        str(find_loadgen()), "--socket", str(sock), "--rw", work.rw, "--bs", str(work.block_bytes),
        "--depth", str(work.depth), "--queues", str(work.queues), "--seconds", str(seconds),
        "--ramp", str(ramp), *options,
    ]
    if work.flush_every:
        command += ["--flush-every", str(work.flush_every)]
    if work.poll:
        command.append("--poll")
    if work.packed:
        command.append("--packed")
    return command


def _result(code: int, stdout: str, stderr: str) -> dict[str, Any]:
    if code:
        raise BenchError(f"loadgen: {stderr.strip() or stdout.strip()[:500]} ({code})")
    parsed: dict[str, Any] = json.loads(stdout)
    return parsed


def run_loadgen(sock: Path, work: Work, seconds: float, ramp: float, *options: str) -> dict[str, Any]:
    command = _command(sock, work, seconds, ramp, *options)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + ramp + 60)
    return _result(done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def load_beside(sock: Path, work: Work, seconds: float, *options: str) -> Iterator[dict[str, Any]]:
    """Runs while the body does, and to its own end; what it found is in the mapping afterwards."""
    command = _command(sock, work, seconds, 0, *options)
    found: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield found
            if "--stay" in options:
                process.terminate()  # it ends as if its time were over
            stdout, stderr = process.communicate(timeout=seconds + 60)
        except BaseException:
            process.kill()
            raise
    found.update(_result(process.returncode, stdout, stderr))
