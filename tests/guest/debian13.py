# SPDX-License-Identifier: Apache-2.0
"""A Debian 13 tree in the cache folder: frontends that the host's distribution may not have.

It holds QEMU 10, its block driver for vhost-user-blk and nbdkit's blkio plugin (both through libblkio).
Its programs run under chroot in a mount namespace of their own, so that no mount can be left behind.
/var/tmp, /proc and /dev are the host's: paths of sockets and images are the same inside.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from tests.guest.assets import AssetError, cache_folder, run

PACKAGES = ("qemu-system-x86", "qemu-utils", "qemu-block-extra", "nbdkit", "libblkio1")

_ENTER = """
set -e
for folder in var/tmp proc dev; do mount --rbind "/$folder" "$0/$folder"; done
exec chroot "$0" "$@"
"""


def _as_root() -> list[str]:
    return [] if os.geteuid() == 0 else ["sudo", "-n"]


def tree() -> Path:
    """The tree, made if it is missing (about two minutes, 600 MB). Raises AssetError."""
    folder = cache_folder() / "debian13"
    if folder.exists():
        return folder
    if shutil.which("debootstrap", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
        raise AssetError("debootstrap is not installed; `./run test --debian13` installs it")
    partial = folder.with_suffix(".partial")
    with partial.with_suffix(".lock").open("w") as lock:  # several processes run tests, and each wants it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder
        run(*_as_root(), "rm", "-rf", "--one-file-system", partial)
        try:
            include = f"--include={','.join(PACKAGES)}"
            run(*_as_root(), "debootstrap", "--variant=minbase", include, "trixie", partial)
        except AssetError as error:
            run(*_as_root(), "rm", "-rf", "--one-file-system", partial)
            raise AssetError(f"cannot make the Debian 13 tree (is the network up?): {error}") from error
        partial.rename(folder)
    return folder


def inside(folder: Path) -> tuple[str, ...]:
    """The words before a command that make it run inside the tree, as root."""
    return (*_as_root(), "unshare", "--mount", "--propagation", "private", "sh", "-c", _ENTER, str(folder))


def run_inside(folder: Path, *command: str, timeout_s: float = 60.0) -> str:
    """Run a program of the tree; what it printed. Raises AssetError when it fails."""
    words = [*inside(folder), *command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
    output = done.stdout + done.stderr
    # qemu-io ends with 0 after some failures; it says so.
    if done.returncode != 0 or "failed" in output.lower() or "error" in output.lower():
        raise AssetError(f"`{' '.join(command)}` ended with {done.returncode}:\n{output}")
    return output
