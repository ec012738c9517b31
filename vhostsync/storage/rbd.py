# SPDX-License-Identifier: Apache-2.0
"""Disks that are images of a Ceph cluster: `rbd:POOL/IMAGE`, `rbd:POOL/NAMESPACE/IMAGE`. What is done with an
image is in rbd_image.py; here is what it means as a disk, and what is said when it fails. Everything here
blocks."""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import structlog

from vhostsync.errors import ConfigError, DiskError, EngineError
from vhostsync.storage import signatures as looking
from vhostsync.storage.ceph_client import CALL_S, Access, CephError, ImageName, Pool
from vhostsync.storage.condition import Condition, Look
from vhostsync.storage.disk import CacheMode, Disk, Spot
from vhostsync.storage.identity import DiskIdentity
from vhostsync.storage.network import Remote, error_means, network_use
from vhostsync.storage.rbd_image import Image, InUseError, UnfitError, opened

log = structlog.get_logger(__name__)

PREFIX: Final = "rbd:"
BLOCK_BYTES: Final = 512
PHYSICAL_BLOCK_BYTES: Final = 4096
DISCARD_BYTES: Final = 65536  # no OSD keeps account of smaller holes
ENDS_BYTES: Final = 1 << 20  # what is read to see what an image holds: at its beginning, and at its end


class RbdDisk:
    """An image whose lock is this process's."""

    direct = True
    why_no_source = None
    logical_block_bytes = BLOCK_BYTES
    physical_block_bytes = PHYSICAL_BLOCK_BYTES
    discard_granularity_bytes = DISCARD_BYTES

    def __init__(self, name: str, image: Image, reopen: Callable[[str], Image]) -> None:
        self.name = name
        self.read_only = image.read_only
        self.bytes = image.size_bytes
        self.identity = DiskIdentity(name, "rbd", 0, 0, self.bytes, serial=image.serial)
        self._image_id = image.image_id
        self._image: Image | None = image
        self._reopen = reopen

    def as_it_is(self) -> DiskIdentity:
        return self.identity

    def with_mark(self, mark: str | None) -> "RbdDisk":
        return self  # its id is its own for good

    def bear_mark(self) -> "RbdDisk":
        return self

    def image_format(self) -> str | None:
        with self._ends() as fd:
            return looking.image_format(fd)

    def signatures(self) -> list[str]:
        with self._ends() as fd:
            return looking.signatures(fd)

    @contextmanager
    def _ends(self) -> Iterator[int]:
        """A file that is as large, and holds what the image's two ends do: what tells what a disk holds is
        there, and it is looked for in files. OSError."""
        assert self._image is not None
        fd = os.memfd_create("ends", os.MFD_CLOEXEC)
        try:
            os.truncate(fd, self.bytes)
            for offset in {0, max(0, self.bytes - ENDS_BYTES)}:
                content = self._image.read(offset, min(ENDS_BYTES, self.bytes - offset))
                os.pwrite(fd, content, offset)
            yield fd
        finally:
            os.close(fd)

    def end_threads(self) -> None:
        """librados has had some since the image was opened."""
        self.close()

    def to_engine(self) -> Any:
        try:
            if self._image is None:
                self._image = self._reopen(self._image_id)
            handle = self._image.to_engine(self.bytes)
        except DiskError as error:
            raise EngineError(str(error), errno.EIO) from error
        except OSError as error:
            number = error.errno or errno.EIO
            raise EngineError.at_start(f"starting the threads of {self.name}", number) from error
        self._image = None
        KIND.note_begun()
        return handle

    def close(self) -> None:
        if self._image is not None:
            self._image.close()
        self._image = None


class Rbd:
    """The kind."""

    prefix = PREFIX
    identities = frozenset({"rbd"})
    over_network = True
    fences_itself = True

    def __init__(self) -> None:
        self._kept: Access | None = None
        self._begun = False  # an engine has a disk: --break-lock is over

    @property
    def _access(self) -> Access:
        """How the cluster is reached: its files are read when it is used first."""
        if self._kept is None:
            use = network_use()
            self._kept = Access(use.ceph_conf, use.ceph_user, use.ceph_keyring).kept()
        return self._kept

    def keep_files(self) -> None:
        """Those that tell how the cluster is reached are read now."""
        self._access  # noqa: B018

    # ---- names ---------------------------------------------------------------------

    def absolute(self, name: str) -> str:
        parsed(name)
        return name

    def overlap(self, one: str, other: str) -> str | None:
        return "one image" if parsed(one) == parsed(other) else None

    def spot(self, name: str) -> Spot | None:
        return None

    def remote(self, name: str) -> Remote | None:
        """Its files are in memory, and which ports the OSDs have nobody knows."""
        return Remote(None, ())

    def places(self, disk: DiskIdentity) -> Iterable[Path]:
        return ()

    # ---- disks ----------------------------------------------------------------------

    def open(self, name: str, *, read_only: bool, cache: CacheMode, lock_timeout_s: float) -> RbdDisk:
        image = self._open(name, None, read_only=read_only, lock_timeout_s=lock_timeout_s)
        try:
            size = image.size_bytes
            if size < BLOCK_BYTES or size % BLOCK_BYTES:
                raise DiskError(
                    f"{name} has {size} bytes, which is no whole number of blocks of {BLOCK_BYTES}; enlarge "
                    f"it: rbd resize {parsed(name)} --size …"
                )
            return RbdDisk(
                name, image,
                lambda image_id: self._open(
                    name, image_id, read_only=read_only, lock_timeout_s=lock_timeout_s
                ),
            )  # fmt: skip
        except BaseException:
            image.close()
            raise

    def _open(self, name: str, image_id: str | None, *, read_only: bool, lock_timeout_s: float) -> Image:
        where = parsed(name)
        try:
            pool = Pool(self._access, where)
            try:
                image = Image(pool, read_only=read_only, image_id=image_id)
            except BaseException:
                pool.close()
                raise
            try:
                image.check_fit()
                if not read_only:
                    image.lock(lock_timeout_s, break_foreign=self._may_break_lock_of(name))
            except BaseException:
                image.close()
                raise
            return image
        except CephError as error:
            raise DiskError(f"{name} cannot be opened: {self._in_words(error, where)}") from error
        except InUseError as error:
            raise DiskError(
                f"{name} is in use: {error}; end that use first, or, if it is certain that it has ended for "
                f"good, begin with --break-lock"
            ) from error
        except UnfitError as error:
            raise DiskError(f"{name} cannot be used: {error}") from error

    def _may_break_lock_of(self, name: str) -> bool:
        return not self._begun and network_use().break_lock_of == name

    def note_begun(self) -> None:
        self._begun = True

    def create(self, name: str, size_bytes: int) -> object:
        where = parsed(name)
        try:
            pool = Pool(self._access, where)
            try:
                pool.create(size_bytes)
            finally:
                pool.close()
            return self.identify(name).serial
        except CephError as error:
            if error.errno == errno.EEXIST:
                raise DiskError(
                    f"{name} exists already and is not overwritten; do without creating, or name another "
                    f"image"
                ) from error
            raise DiskError(f"{name} cannot be created: {self._in_words(error, where)}") from error

    def remove(self, name: str, made: object) -> None:
        try:
            if self.identify(name).serial != made:
                log.warning("what has taken the place of the image that was made stays", name=name)
                return
            pool = Pool(self._access, parsed(name))
            try:
                pool.remove()
            finally:
                pool.close()
        except OSError as error:
            log.warning("the image that was made could not be removed", name=name, error=error.strerror)

    def is_made(self, disk: Disk, made: object) -> bool:
        return disk.identity.serial == made

    # ---- looking --------------------------------------------------------------------

    def is_named(self, name: str, disk: DiskIdentity) -> bool:
        try:
            return disk.kind == "rbd" and self.identify(name).serial == disk.serial
        except OSError:
            return False

    def identify(self, name: str) -> DiskIdentity:
        with self._looked_at(name) as image:
            return DiskIdentity(name, "rbd", 0, 0, image.size_bytes, serial=image.serial)

    def look(self, disk: DiskIdentity) -> Look:
        try:
            with self._looked_at(disk.path) as image:
                if image.serial != disk.serial:
                    return Look(Condition.OTHER)
                image.read(0, BLOCK_BYTES)
                return Look(Condition.THERE, users=tuple(image.users()))
        except CephError as error:
            if error.errno == errno.ENOENT and error.doing in ("pool", "namespace", "image"):
                return Look(Condition.MISSING)
            return Look(Condition.FAILING, self._in_words(error, parsed(disk.path)))
        except OSError as error:
            return Look(Condition.FAILING, error.strerror)

    @contextmanager
    def _looked_at(self, name: str) -> Iterator[Image]:
        """OSError, also where there is no librbd."""
        try:
            with opened(self._access, parsed(name)) as image:
                yield image
        except DiskError as error:
            raise OSError(errno.ENOSYS, str(error), name) from error

    # ---- what is said ----------------------------------------------------------------

    def _in_words(self, error: CephError, where: ImageName) -> str:
        client, pool = self._access.client, where.pool
        match error.doing, error.errno:
            case "configuration", errno.ENOENT:
                return f"there is no configuration file {self._access.conf_path()}; name it with --ceph-conf"
            case "configuration", _:
                return f"the configuration file {self._access.conf_path()} cannot be read ({error.strerror})"
            case "connect", errno.ENOENT:
                return (
                    f"neither a monitor nor a key of {client} is known; name the cluster's configuration "
                    f"file with --ceph-conf, and the user and its keyring with --ceph-user and --ceph-keyring"
                )
            case "connect", errno.EACCES | errno.EPERM | errno.EINVAL:
                return (
                    f"the cluster does not accept {client} with the key that it has here; look at the "
                    f"keyring (ceph auth get {client}), or name another user with --ceph-user"
                )
            case "connect", errno.ETIMEDOUT:
                return (
                    f"no monitor of the cluster has answered within {CALL_S} s; look whether they run and "
                    f"can be reached (mon_host in the configuration file)"
                )
            case "pool", errno.ENOENT:
                return f"the cluster has no pool {pool} (ceph osd pool ls tells what there is)"
            case "namespace", errno.ENOENT:
                return (
                    f"the pool {pool} has no namespace {where.namespace}; make it: rbd namespace create "
                    f"{pool}/{where.namespace}"
                )
            case "image", errno.ENOENT:
                return "there is no such image; make it with rbd create, or have it made with --create"
            case _, errno.EPERM | errno.EACCES:
                return (
                    f"{client} may not do that ({error.doing}); it needs these capabilities: mon 'profile "
                    f"rbd' osd 'profile rbd pool={pool}'"
                )
            case _, errno.ETIMEDOUT:
                return (
                    f"the cluster's OSDs have not answered within {CALL_S} s ({error.doing}); see ceph "
                    f"health detail"
                )
            case _, errno.ESHUTDOWN:
                return "this client was shut out (blocklisted) while it was opened; see ceph osd blocklist ls"
            case _:
                return f"{error.strerror} ({error.doing})"


def parsed(name: str) -> ImageName:
    """ConfigError where it names no image."""
    parts = name.removeprefix(PREFIX).split("/")
    good = all(part and part.isprintable() and not set(part) & set(" @") for part in parts)
    if not name.startswith(PREFIX) or not good or len(parts) not in (2, 3):
        raise ConfigError(
            f"{name!r} names no image of a Ceph cluster; write rbd:POOL/IMAGE or rbd:POOL/NAMESPACE/IMAGE."
        )
    return ImageName(parts[0], parts[1] if len(parts) == 3 else "", parts[-1])


KIND: Final = Rbd()
error_means(
    "rbd", errno.ESHUTDOWN,
    "this backend was shut out of the Ceph cluster (blocklisted), as is done when another one takes the "
    "disk: see who has it (rbd status, ceph osd blocklist ls), and end this backend",
)  # fmt: skip
