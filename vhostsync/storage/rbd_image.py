# SPDX-License-Identifier: Apache-2.0
"""An image of a Ceph cluster, open by a client of its own: one that is shut out (blocklisted) takes no other
disk down with it. librbd's calls are made here, but those for a guest's requests (c_shim/rbd/rbd_disk.c).
Everything here blocks, as ceph_client.py has it.

The exclusive lock is what keeps others out, and the fence (docs/durability.md, rule 8). A client that has it
gives it to nobody who asks; whoever else writes gets EROFS. It is broken only together with the client that
has it: that one is shut out first, for years, because a client that was stopped goes on where it was once
the entry has expired.

Whose lock it is, is noted at the image (`OWNER_KEY`): a start finds out by that whether the owner was a
process of this host that is gone (rbd_owner.py).
"""

import errno
import os
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import structlog

from vhostsync.storage.ceph_client import CALL_S, Access, ImageName, Pool, checked, library
from vhostsync.storage.rbd_owner import Note

log = structlog.get_logger(__name__)

OWNER_KEY: Final = "vhostsync.owner"
SHUT_OUT_KEPT: Final = 8  # addresses of clients that were shut out and may still be seen for a while
NAME_BYTES: Final = 256
METADATA_BYTES: Final = 4096
CLIENTS_MAX: Final = 64
CONFIG_MAX: Final = 1024
RETRY_S: Final = (0.02, 0.06)


class InUseError(Exception):
    """The image is another client's; its message says whose, in words."""


class UnfitError(Exception):
    """The image cannot be a disk here; its message says why, and what to do."""


# The numbers of the clients that have an image open in this process; the engine's are known to the library.
_OPEN: Final[set[int]] = set()


class Image:
    """An open image. `close` ends it, or `to_engine` gives it away."""

    def __init__(self, pool: Pool, *, read_only: bool, image_id: str | None = None) -> None:
        """Owns the pool, unless this fails. `image_id`: the one that it has to be. CephError."""
        self._ffi, self._lib = library()
        self.pool = pool
        self.read_only = read_only
        out = self._ffi.new("rbd_image_t *")
        name = pool.name.image if image_id is None else image_id
        call = f"rbd_open{'' if image_id is None else '_by_id'}{'_read_only' if read_only else ''}"
        checked(getattr(self._lib, call)(pool.pool, name.encode(), out, self._ffi.NULL), "image")
        self.image: Any = out[0]
        self.client = int(self._lib.rados_get_instance_id(pool.cluster))
        _OPEN.add(self.client)

    @property
    def size_bytes(self) -> int:
        size = self._ffi.new("uint64_t *")
        checked(self._lib.rbd_get_size(self.image, size), "size")
        return int(size[0])

    @property
    def image_id(self) -> str:
        text = self._ffi.new("char[]", NAME_BYTES)
        checked(self._lib.rbd_get_id(self.image, text, NAME_BYTES), "image")
        return str(self._ffi.string(text).decode())

    @property
    def serial(self) -> str:
        return f"{self.pool.serial}/{self.image_id}"

    def read(self, offset: int, length: int) -> bytes:
        to = self._ffi.new("char[]", length)
        got = checked(self._lib.rbd_read(self.image, offset, length, to), "read")
        return bytes(self._ffi.buffer(to, got))

    def check_fit(self) -> None:
        """UnfitError where what it is configured to be breaks a promise."""
        features = self._ffi.new("uint64_t *")
        checked(self._lib.rbd_get_features(self.image, features), "features")
        has = int(features[0])
        if not has & self._lib.RBD_FEATURE_EXCLUSIVE_LOCK:
            raise UnfitError(
                f"it has no exclusive lock, so nothing would keep others from writing to it; give it one: "
                f"rbd feature enable {self.pool.name} exclusive-lock"
            )
        if has & self._lib.RBD_FEATURE_DIRTY_CACHE:
            raise UnfitError(
                "a persistent write-back cache of another host has writes that the image lacks; flush that "
                "cache there first (rbd persistent-cache flush)"
            )
        if has & self._lib.RBD_FEATURE_NON_PRIMARY:
            raise UnfitError(
                f"it is the copy that RBD mirroring writes to; promote it first (rbd mirror image promote "
                f"{self.pool.name})"
            )
        settings = self._settings()
        if settings.get("rbd_persistent_cache_mode", "disabled") != "disabled":
            raise UnfitError(
                "a persistent write-back cache is configured for it (rbd_persistent_cache_mode), and what is "
                "flushed into that is on this host alone; turn it off: "
                f"rbd config image set {self.pool.name} rbd_persistent_cache_mode disabled"
            )
        if settings.get("rbd_cache") == "true":
            raise UnfitError(
                "its own configuration, or its pool's, turns librbd's cache on, which would answer writes "
                f"that no OSD has; turn it off: rbd config image set {self.pool.name} rbd_cache false"
            )

    def _settings(self) -> dict[str, str]:
        count = self._ffi.new("int *", CONFIG_MAX)
        options = self._ffi.new("rbd_config_option_t[]", CONFIG_MAX)
        checked(self._lib.rbd_config_image_list(self.image, options, count), "configuration")
        try:
            return {self._text(each.name): self._text(each.value) for each in options[0 : count[0]]}
        finally:
            self._lib.rbd_config_image_list_cleanup(options, count[0])

    def _text(self, pointer: Any) -> str:
        return str(self._ffi.string(pointer).decode(errors="replace"))

    def _is_open_here(self, client: int) -> bool:
        return client in _OPEN or bool(self._lib.vs_rbd_has_client(client))

    # ---- who has it --------------------------------------------------------------

    def lock(self, timeout_s: float, *, break_foreign: bool) -> None:
        """Take the lock for good, once nobody else has the image. The lock of a process of this host that is
        gone is broken at once; any other that is still there after `timeout_s`, only with `break_foreign`.
        InUseError, CephError."""
        deadline = time.monotonic() + timeout_s
        broken: set[str] = set()
        while True:
            owner = self._owner()
            note = Note.read(self._metadata())
            others = self._watchers() - broken - (set(note.shut_out) if note is not None else set())
            if owner is None and not others and self._acquire():
                self._note_owner(note, broken)
                return
            late = time.monotonic() >= deadline
            if owner is not None and note is not None and note.owner_is_gone(owner, self._is_open_here):
                name = str(self.pool.name)
                log.warning("the lock of a process that is gone is broken", image=name, client=owner)
                self._break(owner, broken)
            elif late and break_foreign and (owner is not None or others):
                for each in others | ({owner} if owner is not None else set()):
                    log.warning("a client is shut out", image=str(self.pool.name), client=each)
                    self._break(each, broken)
            elif late:
                raise InUseError(_in_words(owner, others, note))
            else:
                time.sleep(random.uniform(*RETRY_S))  # noqa: S311 no secret

    def users(self) -> list[str]:
        """Who has it, in words."""
        owner, others = self._owner(), self._watchers()
        return [_in_words(owner, others, Note.read(self._metadata()))] if owner is not None or others else []

    def _acquire(self) -> bool:
        """False: another one was faster."""
        result = self._lib.rbd_lock_acquire(self.image, self._lib.RBD_LOCK_MODE_EXCLUSIVE)
        if result in (-errno.EROFS, -errno.EBUSY, -errno.EAGAIN):
            return False
        checked(result, "lock")
        return True

    def _break(self, address: str, broken: set[str]) -> None:
        self.pool.shut_out(address)
        broken.add(address)
        if self._owner() == address:
            mode = self._lib.RBD_LOCK_MODE_EXCLUSIVE
            result = self._lib.rbd_lock_break(self.image, mode, address.encode())
            if result not in (-errno.ENOENT, -errno.EBUSY):  # gone, or another's by now
                checked(result, "lock")

    def _owner(self) -> str | None:
        """The address of the client that has the lock."""
        mode, count = self._ffi.new("rbd_lock_mode_t *"), self._ffi.new("size_t *", CLIENTS_MAX)
        owners = self._ffi.new("char *[]", CLIENTS_MAX)
        result = self._lib.rbd_lock_get_owners(self.image, mode, owners, count)
        if result == -errno.ENOENT:
            return None
        checked(result, "lock")
        try:
            return self._text(owners[0]) if count[0] else None
        finally:
            self._lib.rbd_lock_get_owners_cleanup(owners, count[0])

    def _watchers(self) -> set[str]:
        """The addresses of all other clients that have it open for writing."""
        count = self._ffi.new("size_t *", CLIENTS_MAX)
        watchers = self._ffi.new("rbd_image_watcher_t[]", CLIENTS_MAX)
        checked(self._lib.rbd_watchers_list(self.image, watchers, count), "watchers")
        try:
            found = {(self._text(each.addr), each.id) for each in watchers[0 : count[0]]}
        finally:
            self._lib.rbd_watchers_list_cleanup(watchers, count[0])
        return {address for address, client in found if client != self.client}

    def _metadata(self) -> str | None:
        size, value = self._ffi.new("size_t *", METADATA_BYTES), self._ffi.new("char[]", METADATA_BYTES)
        result = self._lib.rbd_metadata_get(self.image, OWNER_KEY.encode(), value, size)
        if result == -errno.ENOENT:
            return None
        checked(result, "metadata")
        return self._text(value)

    def _note_owner(self, former: "Note | None", broken: set[str]) -> None:
        own = self._owner()
        shut_out = [*(former.shut_out if former is not None else ()), *sorted(broken)][-SHUT_OUT_KEPT:]
        note = Note.of_this_process(own or "", self.client, tuple(shut_out))
        checked(self._lib.rbd_metadata_set(self.image, OWNER_KEY.encode(), note.text().encode()), "metadata")

    # ---- its end -----------------------------------------------------------------

    def to_engine(self, size_bytes: int) -> Any:
        """A vs_disk, which owns it from here on. OSError."""
        handle = self._lib.vs_rbd_disk(self.image, self.pool.pool, self.pool.cluster, size_bytes, CALL_S)
        if handle == self._ffi.NULL:
            raise OSError(self._ffi.errno, os.strerror(self._ffi.errno))
        self.image = self.pool.pool = self.pool.cluster = None
        _OPEN.discard(self.client)
        return handle

    def close(self) -> None:
        if self.image is not None:
            self._lib.rbd_close(self.image)
            self.image = None
        self.pool.close()
        _OPEN.discard(self.client)


def _in_words(owner: str | None, others: Iterable[str], note: "Note | None") -> str:
    if owner is not None:
        whose = f", {note.in_words()}" if note is not None and note.client == owner else ""
        return f"the client at {owner} has its lock{whose}"
    return f"the client at {' and '.join(sorted(others))} has it open for writing"


@contextmanager
def opened(access: Access, name: ImageName) -> Iterator[Image]:
    """To look at it, for reading; whoever has it is not disturbed."""
    pool = Pool(access, name)
    try:
        image = Image(pool, read_only=True)
    except BaseException:
        pool.close()
        raise
    try:
        yield image
    finally:
        image.close()
