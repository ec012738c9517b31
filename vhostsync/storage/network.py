# SPDX-License-Identifier: Apache-2.0
"""How this process uses disks over the network: said once, before the first one is opened."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vhostsync.errors import FenceError


def _nobody_says_so(disk: str) -> None:
    raise FenceError(f"requests of a lost connection may still be carried out at {disk}")


@dataclass(frozen=True)
class NetworkUse:
    connections: int = 1  # to one disk, where its server lets several work together
    allow_plaintext: bool = False  # to other hosts
    reconnect_s: float = 0.0  # so long a guest waits for its own disk's server
    # Before that disk is connected to again: that nothing is carried out any more that the lost connection
    # had under way there. Blocks. FenceError.
    make_certain: Callable[[str], None] = _nobody_says_so
    ceph_conf: str | None = None  # a path; None: what Ceph's own programs would take, also of the next two
    ceph_user: str | None = None
    ceph_keyring: str | None = None
    break_lock_of: str | None = None  # of the disk with this name, when it is opened first


@dataclass(frozen=True)
class Remote:
    """What a disk that lies not on this host needs of it: ports of TCP (None: any may be needed), and files
    to read (certificates, keys)."""

    tcp_ports: tuple[int, ...] | None = ()
    files: tuple[Path, ...] = ()


_use = NetworkUse()


def network_use() -> NetworkUse:
    return _use


def use_network(use: NetworkUse) -> None:
    global _use
    _use = use


# By the kind of a disk's identity and the error number.
_meanings: dict[tuple[str, int], str] = {}


def error_means(kind: str, number: int, words: str) -> None:
    """By a kind of disks: what this error of one of them means, and what to do."""
    _meanings[kind, number] = words


def meaning_of_error(kind: str, number: int) -> str | None:
    return _meanings.get((kind, abs(number)))
