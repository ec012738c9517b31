# SPDX-License-Identifier: Apache-2.0
"""Disk images of the guest tests: made, filled and compared on the host, without mounting anything."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from tests.sizes import MIB


class ImageError(Exception):
    """An image is not what it must be; the message holds what the checking program said."""


def new_image(path: Path, mib: int) -> Path:
    """An empty (sparse) image file."""
    with path.open("wb") as file:
        file.truncate(mib * MIB)
    return path


def fill_random(path: Path, offset: int, length: int) -> None:
    """Random bytes from `offset` on; both in bytes."""
    with path.open("r+b") as file:
        file.seek(offset)
        for start in range(0, length, 4 * MIB):
            file.write(os.urandom(min(4 * MIB, length - start)))


def digest(path: Path, offset: int = 0, length: int = -1, by: hashlib._Hash | None = None) -> str:
    """SHA-256, or another one, of a part of the image (of all of it by default); both in bytes."""
    remaining = path.stat().st_size - offset if length < 0 else length
    by = by or hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while remaining > 0 and (data := file.read(min(4 * MIB, remaining))):
            by.update(data)
            remaining -= len(data)
    return by.hexdigest()


def _run(*command: str | Path, accept: tuple[int, ...] = (0,)) -> str:
    # mke2fs and its kin are in an sbin folder, which is not on every user's path.
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode not in accept:
        raise ImageError(f"`{' '.join(words)}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def make_ext4(image: Path, contents: Path) -> None:
    """An ext4 file system over the whole image, holding what the folder `contents` holds."""
    _run("mke2fs", "-q", "-t", "ext4", "-F", "-E", "lazy_itable_init=0", "-d", contents, image)


def make_ext2(image: Path, contents: Path, *, offset: int) -> None:
    """An ext2 file system from `offset` (bytes) to the end of the image, holding what `contents` holds."""
    blocks = (image.stat().st_size - offset) // 1024
    extended = f"offset={offset}"
    _run("mke2fs", "-q", "-t", "ext2", "-F", "-b", "1024", "-E", extended, "-d", contents, image, str(blocks))


def check_clean(image: Path) -> str:
    """e2fsck must find an ext4 file system that was unmounted and has no fault; returns what it said."""
    return _run("e2fsck", "-f", "-n", image)


def file_of_crashed_ext4(image: Path, name: str, scratch: Path) -> Path:
    """One file out of an ext4 file system that was not unmounted: the journal is replayed, as a mount after a
    power cut would do, on a copy. Returns the extracted file, inside the folder `scratch`."""
    copy = scratch / f"{image.name}.replayed"
    _run("cp", "--sparse=always", "--reflink=auto", image, copy)
    _run("e2fsck", "-f", "-y", copy, accept=(0, 1))  # 1: it mended something, the journal at the least
    target = scratch / f"{image.name}.{Path(name).name}"
    _run("debugfs", "-R", f"dump {name} {target}", copy)
    copy.unlink()
    return target


def file_of_ext4(image: Path, name: str, scratch: Path) -> Path:
    """One file out of a clean ext4 file system; returns the extracted file, inside the folder `scratch`."""
    target = scratch / f"{image.name}.{Path(name).name}"
    _run("debugfs", "-R", f"dump {name} {target}", image)
    return target
