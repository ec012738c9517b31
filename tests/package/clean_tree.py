# SPDX-License-Identifier: Apache-2.0
"""Clean Debian trees in the cache folder, to install into: what is written there is thrown away."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.guest.assets import AssetError, cache_folder, run

_ENTER = """
set -e
mount -t overlay overlay -o "lowerdir=$TREE,upperdir=$UPPER/upper,workdir=$UPPER/work" "$UPPER/root"
cd "$UPPER/root"
cp /etc/resolv.conf etc/resolv.conf
mount -t proc proc proc
for folder in dev sys; do mount --rbind "/$folder" "$folder"; done
printf '#!/bin/sh\\nexit 101\\n' >usr/sbin/policy-rc.d
chmod 755 usr/sbin/policy-rc.d
echo force-unsafe-io >etc/dpkg/dpkg.cfg.d/thrown-away
exec chroot . sh -ec "$1"
"""


def clean_tree(suite: str) -> Path:
    """A minimal tree of this suite, made if it is missing (about a minute, 200 MB). AssetError."""
    folder = cache_folder() / f"clean-{suite}"
    if folder.exists():
        return folder
    if shutil.which("debootstrap", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
        raise AssetError("debootstrap is not installed; `./run package` installs it")
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    run("debootstrap", "--variant=minbase", suite, partial)
    partial.rename(folder)
    return folder


class Root:
    """A copy of a clean tree of its own. `outside` is a folder of the host, inside `/outside`."""

    def __init__(self, suite: str, work: Path) -> None:
        self._tree, self._work = clean_tree(suite), work
        for name in ("upper/outside", "work", "root"):
            (work / name).mkdir(parents=True, exist_ok=True)

    @property
    def outside(self) -> Path:
        """What the host puts there is in the tree, and the other way round, between two scripts."""
        return self._work / "upper/outside"

    def run(self, script: str, *, timeout_s: float = 600.0) -> str:
        """A shell script in the tree, as root, with processes and mounts that end with it. What it printed;
        AssertionError where it fails."""
        words = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
        done = subprocess.run(
            [*words, "sh", "-c", _ENTER, "sh", script],
            env=self._environment(), capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == 0, f"ended with {done.returncode}:\n{said[-6000:]}"
        return said

    def _environment(self) -> Mapping[str, str]:
        return {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive",
            "TREE": str(self._tree), "UPPER": str(self._work),
        }  # fmt: skip
