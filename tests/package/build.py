# SPDX-License-Identifier: Apache-2.0
"""Builds what is installed elsewhere, each from a copy of the files that git knows, as they are now."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.guest.assets import cache_folder

ROOT = Path(__file__).parents[2]


def copy_of_the_tree(folder: Path) -> Path:
    """Without anything that was built, and without what git ignores."""
    folder.mkdir(parents=True)
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, check=True).stdout
    there = [name for name in listed.split(b"\0") if name and (ROOT / os.fsdecode(name)).exists()]
    subprocess.run(
        ["sh", "-c", 'tar -C "$0" --null -T - -cf - | tar -C "$1" -xf -', ROOT, folder],
        input=b"\0".join(there), check=True,
    )  # fmt: skip
    return folder


def succeed(words: list[str | Path], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{said[-6000:]}"
    return said


def build_debian_packages(work: Path) -> Path:
    """The folder that has them. What they bundle was fetched by `./run package`."""
    source = copy_of_the_tree(work / "source")
    succeed(["cp", "-r", cache_folder() / "debian-bundled", source / "debian/bundled"], work)
    succeed(["dpkg-buildpackage", "-b", "-uc", "-us"], source)
    return work


def build_wheel(work: Path) -> Path:
    """For any glibc of 2.34 or newer, with liburing in it."""
    source = copy_of_the_tree(work / "source")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    for option in ("-Dstatic_liburing=true", "-Dnbd=disabled", "-Drbd=disabled"):
        words.append(f"-Csetup-args={option}")
    succeed([*words, "-w", work / "made", source], work, PATH=path)
    (made,) = (work / "made").glob("*.whl")
    succeed([sys.executable, "-m", "auditwheel", "repair", "-w", work, made], work, PATH=path)
    (wheel,) = work.glob("*.whl")
    return wheel
