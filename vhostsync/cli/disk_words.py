# SPDX-License-Identifier: Apache-2.0
"""What the tables of disks say of one."""

from vhostsync.fleet.host_disk import HostDisk
from vhostsync.printable import size


def state(disk: HostDisk) -> str:
    """In a word, and how far a copy is."""
    mirror = disk.mirror or {}
    total = mirror.get("copy-bytes-total")
    if disk.state == "syncing" and total:
        return f"syncing {100 * mirror['copy-bytes-done'] // total} %"
    return f"{disk.state}, paused" if mirror.get("paused") else disk.state


def lag(disk: HostDisk) -> str:
    if disk.mirror is None or disk.state not in ("steady", "ahead"):
        return "-"
    return f"{size(disk.mirror['lag-bytes'])}, {disk.mirror['lag-ms']:.0f} ms"
