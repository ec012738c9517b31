# SPDX-License-Identifier: Apache-2.0
"""Each rule of docs/durability.md broken on purpose, one at a time, in the C core or in Python: a quick test
must notice.

    python -m tests.model.mutations [-j N] [name ...]

A copy of the tree is built in a temporary folder for each worker. A mutation replaces one exact piece of text
in one file of c_shim or vhostsync (it must be there exactly once, so that a mutation which the code has
outgrown is noticed), the extension is built, and the named test is run, which must fail: by an assertion of
its own, by one of the engine's, or by its time limit. Needs meson, ninja and a C compiler, as the build does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.model.mutation import Mutation
from tests.model.mutation_list import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]
COPIED = (
    "c_shim",
    "vhostsync",
    "tests",
    "bench",
    "meson.build",
    "meson_options.txt",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
LIMIT_S = 180

# Python runs this first, also in the processes that a test starts: an editable install puts a finder of its
# own before sys.path, and here the copied tree alone is wanted.
SITE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "eson" not in type(finder).__name__]
"""

RUN = """
import sys
import vhostsync._shim
assert vhostsync._shim.__file__.startswith(sys.argv[1]), vhostsync._shim.__file__
import pytest
raise SystemExit(pytest.main(sys.argv[2:]))
"""


class MutationError(Exception):
    """A mutation that could not be tried: its text is gone, it does not build, its test is not there."""


class Workshop:
    """A copy of the tree with a build folder. Knows no concurrency: one thread uses it at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(
                    source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "build", ".*")
                )
            elif source.exists():
                shutil.copy2(source, folder / name)
        (folder / "sitecustomize.py").write_text(SITE)
        self._build_tool(
            "-m",
            "mesonbuild.mesonmain",
            "setup",
            "build",
            "-Dextension=enabled",
            "-Dc_tests=false",
            "-Doptimization=0",
            "-Ddebug=false",
        )

    def _build_tool(self, *arguments: str) -> None:
        environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise MutationError(f"the build failed:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")

    def build(self) -> None:
        self._build_tool("-m", "mesonbuild.mesonmain", "compile", "-C", "build")
        for name in ("_shim", "_testing"):  # the second is what tests/testing_library.py loads
            (built,) = (self.folder / "build" / "c_shim").glob(f"{name}.*.so")
            shutil.copy2(built, self.folder / "vhostsync")

    def test(self, tests: Sequence[str]) -> tuple[int, str]:
        """pytest's exit status (negative: killed by a signal) and what it said."""
        command = [sys.executable, "-c", RUN, os.fspath(self.folder)]
        command += ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "-o", "timeout=40", *tests]
        environment = dict(
            os.environ, PYTHONPATH=os.fspath(self.folder), VHOSTSYNC_TEST_TIMEOUT_S="2",
            PYTHONDONTWRITEBYTECODE="1",
        )  # fmt: skip
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S
            )
        except subprocess.TimeoutExpired:
            return -1, "time limit"
        return done.returncode, done.stdout + done.stderr

    def try_out(self, mutation: Mutation) -> str | None:
        """How the mutation was caught, or None: it was not. MutationError."""
        path = self.folder / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            raise MutationError(f"its text is in {mutation.file} {text.count(mutation.old)} times, not once")
        path.write_text(text.replace(mutation.old, mutation.new))
        try:
            self.build()
            status, said = self.test([mutation.test])
        finally:
            path.write_text(text)
        if status not in (0, 1) and status > 0:
            raise MutationError(f"{mutation.test} could not be run:\n{said[-2000:]}")
        return _reason(status, said) if status != 0 else None


def _reason(status: int, said: str) -> str:
    """The first line that says what went wrong."""
    if status < -1:
        asserted = [line for line in said.splitlines() if "Assertion" in line]
        return asserted[-1] if asserted else f"killed by signal {-status}"
    return next((line[1:].strip() for line in said.splitlines() if line.startswith("E  ")), "time limit")


def run(mutations: Sequence[Mutation], workers: int) -> list[str]:
    """Tries all of them; what went wrong, a line each. Empty: every one was caught."""
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as top:
        workshops: SimpleQueue[Workshop] = SimpleQueue()
        for number in range(workers):
            workshops.put(Workshop(Path(top) / str(number)))
        sound = workshops.get()
        sound.build()
        status, said = sound.test(sorted({mutation.test for mutation in mutations}))
        workshops.put(sound)
        if status != 0:
            return [f"the tests fail without any mutation:\n{said[-2000:]}"]

        def one(mutation: Mutation) -> str | None:
            workshop = workshops.get()
            try:
                caught = workshop.try_out(mutation)
            except MutationError as error:
                return f"{mutation.name}: {error}"
            finally:
                workshops.put(workshop)
            print(f"{mutation.name}: {caught or 'SURVIVED'}"[:160], flush=True)
            return (
                None if caught else f"{mutation.name}: {mutation.test} does not notice it ({mutation.rule})"
            )

        with ThreadPoolExecutor(workers) as pool:
            failures = [failure for failure in pool.map(one, mutations) if failure]
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-j", type=int, default=2, help="how many at a time")
    parser.add_argument("name", nargs="*", help="only these")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if not arguments.name or m.name in arguments.name]
    failures = run(chosen, arguments.j)
    for failure in failures:
        print(failure)
    print(f"{len(chosen) - len(failures)} of {len(chosen)} mutations were caught")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
