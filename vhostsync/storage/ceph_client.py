# SPDX-License-Identifier: Apache-2.0
"""A client of a Ceph cluster, by librados: how the cluster is reached, and a pool of it. Everything here
blocks, each call no longer than `CALL_S`: as long as the control plane has a client, an operation that does
not end in time fails. The engine's never do: there a request that was given up might still be carried out."""

import errno
import json
import os
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from vhostsync.errors import DiskError
from vhostsync.storage.native import disk_services

CALL_S: Final = 10
SHUT_OUT_S: Final = 10 * 365 * 24 * 3600
USUAL_CONFS: Final = ("/etc/ceph/ceph.conf", "~/.ceph/ceph.conf")
SETTING_BYTES: Final = 4096

# Of the client, whatever its configuration file says.
_FIXED: Final = {
    "rbd_cache": "false",
    "rbd_blocklist_on_break_lock": "false",  # `_shut_out` does so itself: librbd's entry lasts an hour
    "client_mount_timeout": str(CALL_S),
    "rados_mon_op_timeout": str(CALL_S),
    "rados_osd_op_timeout": str(CALL_S),
    "log_to_stderr": "false",
    "err_to_stderr": "false",
}


class CephError(OSError):
    """A call that has failed, and what it was for: `doing` is the name of a step of opening an image."""

    def __init__(self, number: int, doing: str) -> None:
        super().__init__(number, os.strerror(number))
        self.doing = doing


@cache
def library() -> tuple[Any, Any]:
    """librbd's binding: ffi, lib. DiskError where there is none."""
    try:
        from vhostsync import _rbd
    except ImportError as error:
        if "librbd" in str(error) or "librados" in str(error):
            raise DiskError(
                f"disks of a Ceph cluster need librbd, which is not installed ({error}); on Debian it is the "
                f"package librbd1"
            ) from error
        raise DiskError(
            "this vhostsync has no disks of a Ceph cluster: install the package vhostsync-rbd (or "
            "librbd-dev, and build again)"
        ) from error
    if _rbd.lib.vs_rbd_begin(disk_services()) < 0:
        raise DiskError("vhostsync's library for disks of a Ceph cluster does not fit; build it again")
    return _rbd.ffi, _rbd.lib


@dataclass(frozen=True)
class Access:
    """How the cluster is reached. None: as Ceph's own programs would (CEPH_CONF, CEPH_ARGS, /etc/ceph)."""

    conf: str | None = None
    user: str | None = None  # without "client."
    keyring: str | None = None

    @property
    def client(self) -> str:
        user = self.user or _ceph_argument("--id", "--user", "-n", "--name") or "admin"
        return f"client.{user.removeprefix('client.')}"

    def conf_path(self) -> str | None:
        """None: there is no configuration file, so all is in CEPH_ARGS."""
        named = self.conf or _ceph_argument("-c", "--conf")
        if named is not None:
            return named
        usual = re.split(r"[,;\s]+", os.environ.get("CEPH_CONF", "")) + list(USUAL_CONFS)
        places = [Path(each).expanduser() for each in usual if each]
        return next((str(place) for place in places if place.exists()), None)

    def kept(self) -> "Access":
        """The same, where the files have been read for good: later they may be out of reach, for the process
        becomes another user and opens few files. A file that is missing is missed when the disk is opened."""
        conf = self.conf_path()
        if conf is None:
            return self
        kept = replace(self, conf=_in_memory(conf))
        with suppress(CephError):
            client = Client(self)
            try:
                paths = client.setting("keyring").split(",")
            finally:
                client.close()
            keyring = next((path for each in paths if Path(path := each.strip()).is_file()), None)
            if keyring is not None:
                kept = replace(kept, keyring=_in_memory(keyring))
        return kept


def _ceph_argument(*flags: str) -> str | None:
    """librados takes CEPH_ARGS, but not the name and the file, which have to be known before."""
    try:
        words = shlex.split(os.environ.get("CEPH_ARGS", ""))
    except ValueError:
        return None
    for word, following in zip(words, [*words[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        if flag in flags:
            return (value if equals else following) or None
    return None


def _in_memory(path: str) -> str:
    """A path of the file's content, for as long as this process lives; the path itself, where it cannot be
    read."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return path
    fd = os.memfd_create("ceph", os.MFD_CLOEXEC)
    os.write(fd, content)
    return f"/proc/self/fd/{fd}"


@dataclass(frozen=True)
class ImageName:
    pool: str
    namespace: str
    image: str

    def __str__(self) -> str:
        return "/".join(filter(None, (self.pool, self.namespace, self.image)))


def checked(result: int, doing: str) -> int:
    if result < 0:
        raise CephError(-result, doing)
    return result


class Client:
    """Of a cluster, configured and not connected yet: it has no thread. CephError."""

    def __init__(self, access: Access) -> None:
        self._ffi, self._lib = library()
        self.access = access
        out = self._ffi.new("rados_t *")
        checked(self._lib.rados_create2(out, b"ceph", access.client.encode(), 0), "client")
        self.cluster: Any = out[0]
        try:
            self._configure()
        except BaseException:
            self.close()
            raise

    def _configure(self) -> None:
        lib, conf = self._lib, self.access.conf_path()
        if conf is not None:
            checked(lib.rados_conf_read_file(self.cluster, conf.encode()), "configuration")
        checked(lib.rados_conf_parse_env(self.cluster, self._ffi.NULL), "CEPH_ARGS")
        wanted = dict(_FIXED)
        if self.access.keyring is not None:
            wanted["keyring"] = self.access.keyring
        for option, value in wanted.items():
            result = lib.rados_conf_set(self.cluster, option.encode(), value.encode())
            checked(result, f"the option {option}")

    def setting(self, option: str) -> str:
        value = self._ffi.new("char[]", SETTING_BYTES)
        checked(self._lib.rados_conf_get(self.cluster, option.encode(), value, SETTING_BYTES), option)
        return str(self._ffi.string(value).decode())

    def connect(self) -> None:
        checked(self._lib.rados_connect(self.cluster), "connect")

    def command(self, prefix: str, **arguments: Any) -> str:
        """What a monitor answers to this. CephError."""
        words = self._ffi.new("char[]", json.dumps({"prefix": prefix, **arguments}).encode())
        commands = self._ffi.new("char *[1]", [words])
        output, output_bytes = self._ffi.new("char **"), self._ffi.new("size_t *")
        status, status_bytes = self._ffi.new("char **"), self._ffi.new("size_t *")
        result = self._lib.rados_mon_command(
            self.cluster, commands, 1, self._ffi.NULL, 0, output, output_bytes, status, status_bytes
        )
        answer = self._ffi.buffer(output[0], output_bytes[0])[:] if output[0] else b""
        for text in (output[0], status[0]):
            if text:
                self._lib.rados_buffer_free(text)
        checked(result, prefix)
        return str(answer.decode(errors="replace"))

    def close(self) -> None:
        if self.cluster is not None:
            self._lib.rados_shutdown(self.cluster)
        self.cluster = None


class Pool(Client):
    """A pool (or a namespace of it) and the client that has it open. CephError."""

    def __init__(self, access: Access, name: ImageName) -> None:
        self.pool: Any = None
        self.name = name
        super().__init__(access)
        try:
            self.connect()
            self.pool = self._ioctx()
            if name.namespace:
                self._check_namespace()
        except BaseException:
            self.close()
            raise

    def _check_namespace(self) -> None:
        there = self._ffi.new("bool *")
        name = self.name.namespace.encode()
        root = self._ffi.new("rados_ioctx_t *")
        checked(self._lib.rados_ioctx_create(self.cluster, self.name.pool.encode(), root), "pool")
        try:
            result = self._lib.rbd_namespace_exists(root[0], name, there)
        finally:
            self._lib.rados_ioctx_destroy(root[0])
        if result == -errno.EPERM:
            return  # a user who may use that namespace alone cannot ask
        checked(result if result < 0 or there[0] else -errno.ENOENT, "namespace")

    def _ioctx(self) -> Any:
        out = self._ffi.new("rados_ioctx_t *")
        checked(self._lib.rados_ioctx_create(self.cluster, self.name.pool.encode(), out), "pool")
        if self.name.namespace:
            self._lib.rados_ioctx_set_namespace(out[0], self.name.namespace.encode())
        return out[0]

    @property
    def serial(self) -> str:
        """Of the pool: with an image's id it names that for good."""
        fsid = self._ffi.new("char[64]")
        checked(self._lib.rados_cluster_fsid(self.cluster, fsid, 64), "fsid")
        return f"{self._ffi.string(fsid).decode()}/{self._lib.rados_ioctx_get_id(self.pool)}"

    def create(self, size_bytes: int) -> None:
        """An empty image, with a lock."""
        options = self._ffi.new("rbd_image_options_t *")
        self._lib.rbd_image_options_create(options)
        try:
            which, feature = self._lib.RBD_IMAGE_OPTION_FEATURES_SET, self._lib.RBD_FEATURE_EXCLUSIVE_LOCK
            checked(self._lib.rbd_image_options_set_uint64(options[0], which, feature), "create")
            name = self.name.image.encode()
            checked(self._lib.rbd_create4(self.pool, name, size_bytes, options[0]), "create")
        finally:
            self._lib.rbd_image_options_destroy(options[0])

    def remove(self) -> None:
        checked(self._lib.rbd_remove(self.pool, self.name.image.encode()), "remove")

    def shut_out(self, address: str) -> None:
        """The client at this address is not listened to any more, for years: by no OSD that this one has
        asked for anything since."""
        self.command("osd blocklist", blocklistop="add", addr=address, expire=float(SHUT_OUT_S))
        checked(self._lib.rados_wait_for_latest_osdmap(self.cluster), "shut out")

    def close(self) -> None:
        if self.pool is not None:
            self._lib.rados_ioctx_destroy(self.pool)
        self.pool = None
        super().close()
