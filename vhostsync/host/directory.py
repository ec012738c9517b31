# SPDX-License-Identifier: Apache-2.0
"""Makes a directory of our own."""

import os
from pathlib import Path


def make_directory(path: Path, owner: tuple[int, int] | None = None, mode: int = 0o700) -> None:
    """With its missing parents, each durable in its own parent. `owner`: user and group that get the last of
    them, if it is made here. OSError."""
    missing = [path] if not path.exists() else []
    while missing and not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for each in reversed(missing):
        _make_one(each, owner if each == path else None, mode)


def _make_one(path: Path, owner: tuple[int, int] | None, mode: int) -> None:
    """By descriptors: by its name, the owner would be given to what somebody has put in its place."""
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            os.mkdir(path.name, mode, dir_fd=parent)
        except FileExistsError:
            return  # somebody else was quicker, and keeps it
        if owner is not None:
            made = os.open(
                path.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent
            )
            try:
                ours = os.fstat(made).st_uid == os.geteuid()
                if not ours or os.listdir(made):  # noqa: PTH208 a descriptor
                    raise OSError(0, "somebody has put another directory in its place")
                os.fchown(made, *owner)
            finally:
                os.close(made)
        os.fsync(parent)
    finally:
        os.close(parent)
