# SPDX-License-Identifier: Apache-2.0
"""Whose disk this is: kept in a file that is replaced atomically, durable before anything follows from it.

`disk` is what the owner recognises the disk by: a random name, anew for an image that took another's place,
and when the operator gives the disk away. `token` is the owner's secret, which every generation has to show;
None: nobody has attached it yet. `instance` is the process of the owner that has begun the last generation:
one that has begun an earlier one, and was stopped meanwhile, is out. Everything here blocks.
"""

import fcntl
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from vhostsync.errors import StateRecordError
from vhostsync.host.own_file import ForeignFileError, open_regular, seems_to_be
from vhostsync.record.files import RealFileSystem
from vhostsync.record.state_record import NewerVersionError, decode_checked, encode_checked
from vhostsync.storage.identity import DiskIdentity, decode_identity

KIND: Final = "state-receiver"


@dataclass(frozen=True)
class Ownership:
    """What is kept. `left`: the image as it was when nobody wrote to it any more; None: that is not known, or
    the owner may be writing."""

    disk: str
    image: DiskIdentity
    token: str | None = None
    generation: int = 0
    instance: str | None = None
    owner: str | None = None  # in words, for the operator
    since: str | None = None
    left: DiskIdentity | None = None

    def begun(self, instance: str, owner: str, since: str, token: str | None) -> "Ownership":
        """The next generation, which may be writing from here on."""
        return replace(
            self, generation=self.generation + 1, instance=instance, owner=owner, since=since, left=None,
            token=self.token or token,
        )  # fmt: skip


class OwnershipFile:
    """One process at a time has it: it is locked from `open` to `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = RealFileSystem()
        self._lock_fd: int | None = None

    @property
    def key_folder(self) -> Path:
        """Of the generation that runs: it is worth nothing after that."""
        return Path(f"{self.path}.key")

    def open(self) -> Ownership | None:
        """What is kept; None: nothing yet. StateRecordError."""
        lock = Path(f"{self.path}.lock")
        try:
            fd = open_regular(lock, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise StateRecordError(
                f"the lock of the receiver's state, {lock}, cannot be used: {error.strerror}; name another "
                "--state-file"
            ) from error
        try:
            if os.fstat(fd).st_size:
                raise ForeignFileError(seems_to_be(fd))
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise StateRecordError(
                f"the receiver's state {self.path} is in use by another process ({error.strerror}); end "
                "that one, or "
                f"name another --state-file"
            ) from error
        self._lock_fd = fd
        try:
            return self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> Ownership | None:
        try:
            text = self._files.read(self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateRecordError(
                f"the receiver's state {self.path} cannot be read: {error.strerror}"
            ) from error
        try:
            return _decoded(decode_checked(KIND, text))
        except NewerVersionError as error:
            raise StateRecordError(f"the receiver's state {self.path} cannot be read: {error}") from error
        except (ValueError, TypeError) as error:
            raise StateRecordError(
                f"the receiver's state {self.path} is damaged ({error}), so it cannot be told whose disk "
                "this is; "
                f"restore it from a backup, or move it away: then the disk is for whoever attaches it next"
            ) from error

    def save(self, ownership: Ownership) -> None:
        """Durable on return. StateRecordError."""
        new = Path(f"{self.path}.new")
        try:
            self._files.write_durable(new, encode_checked(KIND, asdict(ownership)))
            self._files.rename(new, self.path)
            self._files.sync_directory(self.path.parent)
        except OSError as error:
            raise StateRecordError(
                f"the receiver's state {self.path} cannot be written: {error.strerror}"
            ) from error

    def close(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


def _decoded(body: dict[str, Any]) -> Ownership:
    left = body.get("left")
    return Ownership(
        **{
            **body,
            "image": decode_identity(body["image"]),
            "left": decode_identity(left) if left is not None else None,
        }
    )
