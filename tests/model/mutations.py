# SPDX-License-Identifier: Apache-2.0
"""Each rule of docs/durability.md broken on purpose, one at a time, in the C core or in Python: a quick test
must notice.

    python -m tests.model.mutations [-j N] [--patience SECONDS] [name ...]

A copy of the tree is built in a temporary folder for each worker. A mutation replaces one exact piece of text
in one file of c_shim or vhostsync (it must be there exactly once, so that a mutation which the code has
outgrown is noticed), the extension is built, and the named test is run, which must fail: by an assertion of
its own, by one of the engine's, or by its time limit. One that runs out of time is run again without the
mutation, for on a busy machine that says nothing: then give it more patience. Needs meson, ninja and a C
compiler, as the build does.
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import itertools
import multiprocessing
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest

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
# That of any Python, where meson can build one. (Two threads that ask sysconfig first get half an answer.)
SUFFIXES = (".abi3.so", sysconfig.get_config_var("EXT_SUFFIX"))
PATIENCE_S = 5.0  # how long a test waits for what comes at once
LIMIT_S = 180
LIMIT_OF_ALL_S = 900  # for the tests of all mutations in one run
OUT_OF_TIME = re.compile(r"time limit|Timeout|timed out|within [0-9.]+ s")

# Python runs this first in the processes that a test starts: `./run` (this_tree.py) or an editable install
# puts a finder before sys.path, and here the copied tree alone is wanted.
SITE = """
import sys
sys.meta_path[:] = [
    finder for finder in sys.meta_path if not {"ThisTree", "MesonpyMetaFinder"} & {type(finder).__name__}
]
"""

# What every test loads and no mutation changes: loaded once, by a process that then forks one for each test.
LOADED_ONCE = ["pytest", "hypothesis.stateful", "anyio._backends._asyncio", "structlog", "_cffi_backend"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(LOADED_ONCE)


class MutationError(Exception):
    """A mutation that could not be tried: its text is gone, it does not build, its test is not there."""


class Workshop:
    """A copy of the tree with a build folder. Knows no concurrency: one thread uses it at a time."""

    def __init__(self, folder: Path, patience_s: float = PATIENCE_S) -> None:
        self.folder = folder
        self.patience_s = patience_s
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(
                    source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "build", ".*")
                )
            elif source.exists():
                shutil.copy2(source, folder / name)
        (folder / "sitecustomize.py").write_text(SITE)
        # By hash, not by time: a source that is mutated within a second is noticed, and all others need not
        # be compiled for each of the many processes that the tests start.
        by_hash = py_compile.PycInvalidationMode.CHECKED_HASH
        for name in ("vhostsync", "tests"):
            compileall.compile_dir(folder / name, quiet=1, invalidation_mode=by_hash)
        self._build_tool(
            "-m",
            "mesonbuild.mesonmain",
            "setup",
            "build",
            "-Dextension=enabled",
            "-Dcore_tests=false",
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
        """The extensions alone; the second is what tests/testing_library.py loads, the others are those of
        disks over a network that can be built here."""
        known = (self.folder / "build" / "build.ninja").read_text()
        names = [f"{name}{end}" for name in ("_shim", "_testing", "_nbd", "_rbd") for end in SUFFIXES]
        names = [name for name in names if f" c_shim/{name}" in known]
        self._build_tool("-m", "ninja", "-C", "build", *(f"c_shim/{name}" for name in names))
        for name in names:
            shutil.copy2(self.folder / "build" / "c_shim" / name, self.folder / "vhostsync")

    def test(self, tests: Sequence[str], limit_s: float = LIMIT_S) -> tuple[int, str]:
        """pytest's exit status (negative: killed by a signal) and what it said."""
        output = self.folder / "said"
        process = FORKS.Process(target=_run_pytest, args=(self.folder, output, tests, self.patience_s))
        process.start()
        process.join(limit_s * max(1.0, self.patience_s / PATIENCE_S))
        if process.exitcode is None:
            process.kill()
            process.join()
            return -1, "time limit"
        return process.exitcode, output.read_text(errors="replace")

    def fails_unchanged(self, mutations: Sequence[Mutation], limit_s: float = LIMIT_OF_ALL_S) -> str | None:
        """What the mutations' tests say if they fail on the sound tree."""
        self.build()
        status, said = self.test(sorted({mutation.test for mutation in mutations}), limit_s)
        return said[-2000:] if status != 0 else None

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
        if status == 0:
            return None
        reason = _reason(status, said)
        if OUT_OF_TIME.search(reason) and self.fails_unchanged([mutation], LIMIT_S):
            raise MutationError(f"{mutation.test} runs out of time without the mutation, too ({reason})")
        return reason


def _run_pytest(folder: Path, output: Path, tests: Sequence[str], patience_s: float) -> None:
    """In a process of its own, which has loaded nothing of this tree that it would not load again."""
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ |= {
        "PYTHONPATH": os.fspath(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "VHOSTSYNC_TEST_TIMEOUT_S": str(patience_s),
    }
    sys.dont_write_bytecode = True
    sys.path[:] = [os.fspath(folder), *(path for path in sys.path if path not in ("", os.fspath(ROOT)))]
    exec(SITE)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "vhostsync")]:
        del sys.modules[name]
    shim = importlib.import_module("vhostsync._shim")
    assert str(shim.__file__).startswith(os.fspath(folder)), shim.__file__
    # Assertions of plugins are not of interest, and some of those are loaded already.
    words = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "-o", f"timeout={8 * patience_s}"]
    words += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    raise SystemExit(int(pytest.main([*words, *tests])))


def _reason(status: int, said: str) -> str:
    """The first line that says what went wrong."""
    if status < -1:
        asserted = [line for line in said.splitlines() if "Assertion" in line]
        return asserted[-1] if asserted else f"killed by signal {-status}"
    return next((line[1:].strip() for line in said.splitlines() if line.startswith("E  ")), "time limit")


def run(mutations: Sequence[Mutation], workers: int, patience_s: float = PATIENCE_S) -> list[str]:
    """Tries all; what went wrong, a line each. Empty: all were caught. MutationError: nothing builds."""
    # Those of a file share a build of all other files.
    by_file = sorted(mutations, key=lambda mutation: mutation.file)
    groups = [list(group) for _, group in itertools.groupby(by_file, key=lambda mutation: mutation.file)]
    with tempfile.TemporaryDirectory(prefix="mutations-") as top:
        workshops: SimpleQueue[Workshop] = SimpleQueue()
        for number in range(workers):
            workshops.put(Workshop(Path(top) / str(number), patience_s))

        def one(mutation: Mutation, workshop: Workshop) -> str | None:
            try:
                caught = workshop.try_out(mutation)
            except MutationError as error:
                return f"{mutation.name}: {error}"
            print(f"{mutation.name}: {caught or 'SURVIVED'}"[:160], flush=True)
            return (
                None if caught else f"{mutation.name}: {mutation.test} does not notice it ({mutation.rule})"
            )

        def one_file(group: list[Mutation]) -> list[str | None]:
            workshop = workshops.get()
            try:
                said = workshop.fails_unchanged(group)
                if said is None:
                    return [one(mutation, workshop) for mutation in group]
                print(f"not tried, for their tests fail without any mutation:\n{said}", flush=True)
                return [f"{mutation.name}: not tried" for mutation in group]
            finally:
                workshops.put(workshop)

        with ThreadPoolExecutor(workers) as pool:
            tried = pool.map(one_file, sorted(groups, key=len, reverse=True))
            return [failure for group in tried for failure in group if failure]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-j", type=int, default=2, help="how many at a time")
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE_S,
        metavar="SECONDS",
        help="how long a test waits for what comes at once (%(default)g); more on a busy machine",
    )
    parser.add_argument("name", nargs="*", help="only these")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if not arguments.name or m.name in arguments.name]
    try:
        failures = run(chosen, arguments.j, arguments.patience)
    except MutationError as error:
        print(error)
        return 1
    for failure in failures:
        print(failure)
    print(f"{len(chosen) - len(failures)} of {len(chosen)} mutations were caught")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
