# SPDX-License-Identifier: Apache-2.0
"""QEMU's own test of vhost-user-blk, built from the distribution's source of the QEMU that is installed.

`./run qtest` builds it (`python -m tests.guest.qtest`): QEMU's `qos-test`, unmodified, and the accelerator
"qtest", a module that the distribution's packages leave out. Both are kept in the cache folder, in a folder
named after QEMU's version; the source, of which nothing else is needed, is not. test_qtest.py runs them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.guest.assets import AssetError, cache_folder, run

QEMU = "qemu-system-x86_64"
PACKAGE = "qemu-system-x86"
PARTS = ("tests/qtest/qos-test", "accel-qtest-x86_64.so")
CONFIGURE = (
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-modules",
    "--enable-tools",
    "--enable-vhost-user",
    "--enable-vhost-user-blk-server",
    "--disable-werror",
)


@dataclass(frozen=True)
class Qtest:
    """Where the test is, and the folder of QEMU's modules that it needs."""

    program: Path
    modules: Path


def built() -> Qtest | None:
    """The test for the QEMU that is installed, if it was built."""
    folder = _folder()
    if folder is None or not (folder / "qos-test").exists():
        return None
    return Qtest(folder / "qos-test", folder)


def build() -> Qtest:
    """The test, made if it is missing (about ten minutes, and 1.5 GB while it lasts). Raises AssetError."""
    ready = built()
    if ready is not None:
        return ready
    folder = _folder()
    if folder is None:
        raise AssetError(f"{PACKAGE} is not installed")
    with tempfile.TemporaryDirectory(prefix="qtest-", dir=cache_folder()) as scratch:
        source = _source(Path(scratch))
        objects = source / "build-qtest"
        objects.mkdir()
        # A module is loaded by the QEMU only whose version, package and configure script it was built with.
        package = re.search(r"\((.*)\)", run(QEMU, "--version").splitlines()[0])
        named = [f"--with-pkgversion={package[1]}"] if package else []
        meson = shutil.which("meson") or "meson"
        run(source / "configure", *CONFIGURE, *named, f"--meson={meson}", cwd=objects)
        run("ninja", *PARTS, cwd=objects)
        partial = Path(scratch) / "result"
        partial.mkdir()
        for part in PARTS:
            shutil.copy(objects / part, partial)
        partial.rename(folder)
    return Qtest(folder / "qos-test", folder)


def _folder() -> Path | None:
    try:
        version = run("dpkg-query", "-W", "-f", "${Version}", PACKAGE)
    except AssetError:
        return None
    return cache_folder() / f"qtest-{re.sub('[^A-Za-z0-9.+~-]', '_', version)}" if version else None


def _source(scratch: Path) -> Path:
    """QEMU's source as the distribution has it, from where the machine has its packages. Apt's settings and
    lists stay as they are."""
    version = run("dpkg-query", "-W", "-f", "${source:Version}", PACKAGE)
    parts = scratch / "sources.list.d"
    parts.mkdir()
    etc = Path("/etc/apt")
    for each in (etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))):
        if each.suffix not in (".list", ".sources") or not each.exists():
            continue
        text = each.read_text()
        text = re.sub(r"(?m)^deb(?=\s)", "deb-src", text)
        (parts / each.name).write_text(re.sub(r"(?m)^Types:.*$", "Types: deb-src", text))
    (scratch / "lists" / "partial").mkdir(parents=True)
    apt = (
        *("apt-get", "-q", "-o", "Dir::Etc::sourcelist=/dev/null", "-o", f"Dir::Etc::sourceparts={parts}"),
        *("-o", f"Dir::State::lists={scratch / 'lists'}", "-o", "APT::Sandbox::User=root"),
    )
    with contextlib.suppress(AssetError):  # one place without sources; what counts is whether QEMU's come
        run(*apt, "update")
    try:
        run(*apt, "source", f"qemu={version}", cwd=scratch)
    except AssetError as error:
        raise AssetError(f"cannot fetch QEMU's source (is the network up?): {error}") from error
    return next(path for path in scratch.iterdir() if path.is_dir() and (path / "configure").exists())


if __name__ == "__main__":
    try:
        os.nice(5)
        print(build().program)
    except AssetError as problem:
        sys.exit(f"vhostsync: {problem}")
