# SPDX-License-Identifier: Apache-2.0
"""What `serve` may still do once it serves: no more than it needs.

In this order, because most of it holds only for the thread that asks for it and for threads started later:

1. As whoever started it, in the only thread: the disk is opened (and an inherited socket taken over).
2. `change_user`: --user. All that will be needed again is opened after this, as that user: the state record,
   the bitmap, the sockets. What it lacks a right for shows at the start and not when a mirror degrades.
3. `confine`, still in the only thread, so every later thread inherits it: no capability is left, none can be
   gained by running a program (no_new_privs, an empty bounding set), no memory becomes code (MDWE), nobody of
   the same user reads this memory (not dumpable, so no core files either). Where --allow-path says where
   destinations may lie (or with `require`), Landlock withholds all files but there and in the directories in
   use.
4. The engine starts its thread and its io_uring, which takes what the engine asks of it and nothing else.
5. `seal`: the seccomp filter, on all threads. Last, because it forbids making another ring.

`--sandbox auto` takes what the kernel has and logs it; `require` refuses to serve when a part is missing;
`off` does none of 3 and 5.
"""

import grp
import os
import pwd
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import structlog

from vhostsync.config import ServeConfig
from vhostsync.confine import landlock
from vhostsync.confine.seccomp import Filter
from vhostsync.errors import ConfigError, MirrorError
from vhostsync.host.kernel import (
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_CLEAR_ALL,
    PR_CAPBSET_DROP,
    PR_CAPBSET_READ,
    PR_MDWE_REFUSE_EXEC_GAIN,
    PR_SET_DUMPABLE,
    PR_SET_MDWE,
    PR_SET_NO_NEW_PRIVS,
    Kernel,
)
from vhostsync.option_values import Sandbox, TcpAddress
from vhostsync.storage import kinds
from vhostsync.storage.identity import DiskIdentity
from vhostsync.storage.network import Remote

log = structlog.get_logger(__name__)

CAPABILITIES_MAX: Final = 64
# To read: the interpreter and its modules, and what a disk lies on.
SYSTEM_PLACES: Final = (
    "/usr", "/lib", "/lib64", "/proc", "/sys/dev", "/sys/devices", "/sys/block", "/sys/class/block",
    "/run/udev/data", "/dev/urandom", "/dev/null",
)  # fmt: skip
# Of /etc by name, as secrets lie there as well: what loads libraries, tells the time zone and users' names.
SYSTEM_FILES: Final = (
    "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ld.so.preload", "localtime", "timezone", "nsswitch.conf",
    "passwd", "group",
)  # fmt: skip
# And what finds other hosts and whom TLS trusts.
NETWORK_FILES: Final = (
    "hosts", "host.conf", "resolv.conf", "gai.conf", "services", "gnutls", "crypto-policies", "ssl/certs",
    "pki",
)  # fmt: skip


@dataclass(frozen=True)
class User:
    """Whom --user means."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """What the disks that are known need of the network, and --allow-port. `ports`: of TCP, to connect to;
    None: any. `files`: to read."""

    ports: frozenset[int] | None = frozenset()
    files: tuple[Path, ...] = ()

    @property
    def is_used(self) -> bool:
        return self.ports is None or bool(self.ports)


def network_of(config: ServeConfig, names: Iterable[str]) -> Network:
    """Of the disks of these names, and --allow-port. Nobody knows beforehand which ports a Ceph cluster's
    OSDs have, so whoever says how one is reached has all of them."""
    ports: frozenset[int] | None = None if config.names_ceph else frozenset(config.allow_ports)
    files: list[Path] = []
    for remote in filter(None, map(kinds.remote, names)):
        files += remote.files
        ports = None if ports is None or remote.tcp_ports is None else ports | frozenset(remote.tcp_ports)
    return Network(ports, tuple(files))


@dataclass(frozen=True)
class Reach:
    """Where destinations may lie. `enforced`: the kernel withholds all else (Landlock)."""

    places: tuple[Path, ...] = ()
    enforced: bool = False
    network: Network = Network()

    def check(self, disk: str) -> None:
        """MirrorError where the kernel would not let it be opened. Blocks."""
        if not self.enforced:
            return
        remote = kinds.remote(disk)
        if remote is not None:
            self._check_remote(disk, remote)
        spot = kinds.spot(disk)
        if spot is not None and not self._within(spot.real):
            raise MirrorError(
                f"the destination {disk} lies outside the directories that this backend may use "
                f"({', '.join(map(str, self.places))}); start it with --allow-path {spot.allow}"
            )


    def _within(self, path: Path) -> bool:
        return any(path.is_relative_to(place) for place in self.places)

    def _check_remote(self, disk: str, remote: Remote) -> None:
        if remote.tcp_ports is None and self.network.ports is not None:
            raise MirrorError(
                f"the destination {disk} may need any port of TCP, and this backend may use only those of "
                f"the disks that it was started with; start it with --ceph-conf, where it is one of a Ceph "
                f"cluster, or without --allow-path and --sandbox=require"
            )
        for port in remote.tcp_ports or ():
            if self.network.ports is not None and port not in self.network.ports:
                raise MirrorError(
                    f"the destination {disk} is reached by TCP port {port}, which this backend may not use; "
                    f"start it with --allow-port {port}"
                )
        for file in remote.files:
            if not self._within(real_path(file)) and file not in self.network.files:
                raise MirrorError(
                    f"{file} lies outside the directories that this backend may use, and {disk} needs it; "
                    f"start it with --allow-path {file if file.is_dir() else file.parent}"
                )


def find_user(text: str) -> User:
    """`text` is NAME or NAME:GROUP; numbers are taken too. ConfigError."""
    name, _, group = text.partition(":")
    try:
        entry = pwd.getpwuid(int(name)) if name.isascii() and name.isdigit() else pwd.getpwnam(name)
    except KeyError as error:
        raise ConfigError(f"--user {text}: this machine has no user {name}.") from error
    gid = entry.pw_gid
    if group:
        try:
            gid = int(group) if group.isascii() and group.isdigit() else grp.getgrnam(group).gr_gid
        except KeyError as error:
            raise ConfigError(f"--user {text}: this machine has no group {group}.") from error
    return User(entry.pw_name, entry.pw_uid, gid, tuple(os.getgrouplist(entry.pw_name, gid)))


def change_user(user: User) -> None:
    """For good, supplementary groups included. ConfigError."""
    if (os.getuid(), os.geteuid(), os.getgid(), os.getegid()) == (user.uid, user.uid, user.gid, user.gid):
        return
    try:
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except PermissionError as error:
        raise ConfigError(
            f"--user {user.name}: only root can become another user; start it as {user.name} instead."
        ) from error
    os.environ["HOME"] = pwd.getpwuid(user.uid).pw_dir


def places_of(
    config: ServeConfig, disks: Iterable[DiskIdentity], state_directory: Path | None
) -> tuple[Path, ...]:
    """The directories that are written to: of the disks (a block device: it alone, not all of /dev), the
    state record, the bitmap, the sockets, and --allow-path."""
    found: list[Path] = list(config.allow_paths)
    for disk in disks:
        found += kinds.places(disk)
    metrics = config.metrics if isinstance(config.metrics, Path) else None
    for file in (config.state_file, config.bitmap, config.socket_path, config.control_socket, metrics):
        if file is not None:
            found.append(file.parent)
    if config.state_file is not None:
        found.append(real_path(config.state_file).parent)  # it may be a link
    if state_directory is not None:
        found.append(state_directory)
    return tuple(dict.fromkeys(real_path(place) for place in found))


def real_path(path: Path) -> Path:
    """Without symbolic links, as far as it can be told: a lost destination is no reason not to serve."""
    return Path(os.path.realpath(path))


class Confined(Protocol):
    """What the configuration says of it."""

    @property
    def sandbox(self) -> Sandbox: ...
    @property
    def allow_paths(self) -> tuple[Path, ...]: ...
    @property
    def metrics(self) -> Path | TcpAddress | None: ...


@dataclass(frozen=True)
class Programs:
    """What a process has to run, and what those read beside the system's own files."""

    run: tuple[Path, ...]
    read: tuple[Path, ...]


class Confinement:
    """The steps of `confine` and `seal`, and which of them hold. `programs`: where some have to be run, the
    places are all that is written to, so Landlock withholds the rest unasked."""

    def __init__(
        self, config: Confined, places: tuple[Path, ...], kernel: Kernel | None = None, *,
        programs: Programs | None = None, network: Network = Network(),
    ) -> None:  # fmt: skip
        self._config = config
        self._places = places
        self._programs = programs
        self._network = network
        self._kernel = kernel if kernel is not None else Kernel()
        self.held: list[str] = []
        self.lacking: list[str] = []
        self.reach = Reach(places)

    def confine(self) -> None:
        """Step 3. ConfigError, with --sandbox=require, when a part is not to be had."""
        if self._config.sandbox == "off":
            return
        assert self._kernel.threads() == 1, "threads that run already would keep what they have"
        self._part("capabilities", self._drop_capabilities)
        self._part("no-new-privs", lambda: self._kernel.prctl(PR_SET_NO_NEW_PRIVS, 1))
        self._part("no-new-code", lambda: self._kernel.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN))
        self._part("not-dumpable", lambda: self._kernel.prctl(PR_SET_DUMPABLE, 0))
        if self._knows_all_places:
            self._part("landlock", self._landlock)
        self._complete()

    def seal(self, check_rings_restricted: Callable[[], None] | None = None) -> None:
        """Step 5. `check_rings_restricted`: the engine's, OSError if not; None: there are no rings.
        ConfigError as `confine`."""
        if self._config.sandbox == "off":
            self._warn_of_root()
            log.info("privileges", sandbox="off", user=os.geteuid())
            return
        if check_rings_restricted is not None:
            self._part("io-uring", check_rings_restricted)
        internet, programs = self._uses_internet, self._programs is not None
        self._part("seccomp", lambda: Filter(internet=internet, programs=programs).load())
        self._complete()
        self._warn_of_root()
        log.info(
            "privileges", sandbox=self._config.sandbox, user=os.geteuid(), held=self.held,
            not_available=self.lacking,
            # Without Landlock nothing but the modes of files says so.
            **{"may_write": [str(place) for place in self._places]} if self.reach.enforced else {},
        )  # fmt: skip

    @property
    def _knows_all_places(self) -> bool:
        """Where disks may lie has been said. Unasked nothing is withheld: a destination may lie anywhere, on
        the network too, and nobody can say so after the start."""
        config = self._config
        return bool(config.allow_paths) or config.sandbox == "require" or self._programs is not None

    @property
    def _uses_internet(self) -> bool:
        metrics = isinstance(self._config.metrics, TcpAddress)
        return metrics or self._network.is_used or not self._knows_all_places

    def _warn_of_root(self) -> None:
        """Without capabilities root still owns the files that the machine runs by."""
        if os.geteuid() == 0 and not self.reach.enforced:
            log.warning(
                "this process is root and can open all of root's files, so a guest that took it over would "
                "have the machine: give it a user of its own (--user), or say where destinations may lie "
                "(--allow-path), which needs Landlock"
            )

    def _part(self, name: str, do: Callable[[], object]) -> None:
        try:
            do()
        except OSError as error:
            self.lacking.append(f"{name} ({error.strerror or error})")
        else:
            self.held.append(name)

    def _complete(self) -> None:
        if self.lacking and self._config.sandbox == "require":
            raise ConfigError(
                f"--sandbox=require, and this machine does not have: {', '.join(self.lacking)}; use "
                f"--sandbox=auto to do without."
            )

    def _drop_capabilities(self) -> None:
        self._empty_bounding_set()
        self._kernel.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
        self._kernel.drop_capabilities()

    def _empty_bounding_set(self) -> None:
        """Only with CAP_SETPCAP, so not for an ordinary user, whom no_new_privs keeps from using it."""
        for number in range(CAPABILITIES_MAX):
            try:
                if self._kernel.prctl(PR_CAPBSET_READ, number):
                    self._kernel.prctl(PR_CAPBSET_DROP, number)
            except PermissionError:
                return
            except OSError:
                return  # the last one is behind us

    def _landlock(self) -> None:
        version = landlock.abi(self._kernel)
        if version == 0:
            raise OSError(0, "the kernel does not have it, or not switched on")
        for place in self._config.allow_paths:
            if not os.access(place, os.F_OK):
                log.warning("--allow-path is missing: nothing may be opened there", path=str(place))
        metrics = self._config.metrics
        port = metrics.port if isinstance(metrics, TcpAddress) else None
        network = self._network
        run, more = (self._programs.run, self._programs.read) if self._programs is not None else ((), ())
        read = _read_places(SYSTEM_FILES + (NETWORK_FILES if network.is_used else ()))
        peers = tuple(sorted(network.ports)) if network.ports is not None else None
        grants = landlock.Grants((*read, *more, *network.files), self._places, port, run, peers)
        landlock.restrict(self._kernel, version, grants)
        self.reach = Reach(self._places, enforced=True, network=network)


def _read_places(files_of_etc: tuple[str, ...] = SYSTEM_FILES) -> tuple[Path, ...]:
    """Modules may be imported later: the interpreter's path, and where this package is."""
    interpreter = (sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path)
    found = {Path(place).resolve() for place in (*SYSTEM_PLACES, *interpreter) if place}
    found |= {(Path("/etc") / name).resolve() for name in files_of_etc}
    extension = sys.modules.get("vhostsync._shim")
    if extension is not None and extension.__file__ is not None:
        # So are others; in a tree that is worked on not within the package.
        found.add(Path(extension.__file__).resolve().parent)
    with suppress(OSError):  # it may have been removed
        # `python -m` puts the current directory, perhaps /, where modules are looked for.
        found.discard(Path.cwd())
    return tuple(sorted(found | {Path(__file__).parent.parent.resolve()}))
