# SPDX-License-Identifier: Apache-2.0
"""What a process holds: descriptors, mappings, threads, memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holding:
    """Of a process, without the guest's own memory, which is only mapped.

    `areas_kib` is what it has touched of the engine's areas of a fixed size: the log and the buffers of copy
    and verification. `memory_kib` is all the rest. Threads are counted without those of the kernel."""

    descriptors: int
    mappings: int
    threads: int
    memory_kib: int
    areas_kib: int


def holding(pid: int) -> Holding:
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line)

    def number(name: str) -> int:
        return int(status[name].split()[0])

    names = [_name(task) for task in (process / "task").iterdir()]
    areas_kib = _areas_kib((process / "smaps").read_text())
    return Holding(
        descriptors=len(list((process / "fd").iterdir())),
        mappings=len((process / "maps").read_text().splitlines()),
        threads=sum(name is not None and not name.startswith("iou-") for name in names),
        memory_kib=number("VmRSS") - number("RssShmem") - areas_kib,
        areas_kib=areas_kib,
    )


def _name(task: Path) -> str | None:
    """None: the thread has ended meanwhile, as io_uring's workers do at any time."""
    try:
        return (task / "comm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _areas_kib(smaps: str) -> int:
    """Private mappings that are reserved without being charged (nr) and not dumped (dd): only the engine
    makes such ones."""
    found, private, resident_kib = 0, False, 0
    for line in smaps.splitlines():
        name, _, rest = line.partition(":")
        if name == "Rss":
            resident_kib = int(rest.split()[0])
        elif name == "VmFlags":
            flags = rest.split()
            if private and "nr" in flags and "dd" in flags:
                found += resident_kib
        elif "-" in name and " " in name:  # the first line of a mapping
            private = name.split()[1].endswith("p")
    return found
