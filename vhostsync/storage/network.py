# SPDX-License-Identifier: Apache-2.0
"""How this process uses disks over the network: said once, before the first one is opened."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NetworkUse:
    connections: int = 1  # to one disk, where its server lets several work together
    allow_plaintext: bool = False  # to other hosts
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
