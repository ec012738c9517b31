# SPDX-License-Identifier: Apache-2.0
"""A guest that writes and flushes at random, what a disk may hold of it after a power cut, and how a process
ends that has served it (test_policy.py, test_lineage.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import anyio
import anyio.to_thread

from tests.engine_driver import Cut, MemoryDisk
from tests.frontend import Frontend, Request
from tests.model.rig import BLOCK, pattern
from tests.model.stage import AsyncTransport
from tests.sizes import MIB
from vhostsync.engine.engine import Engine
from vhostsync.mirror.mirror import Mirror
from vhostsync.record.bitmap import BitmapFile

SIZE = 4 * MIB
BLOCKS = 24
SPREAD = SIZE // BLOCK // BLOCKS


@dataclass
class Guest:
    """What it has been told: `allowed` has, by block, what the block may hold after a power cut."""

    frontend: Frontend
    allowed: dict[int, list[int]]
    seeds: list[int]
    writes: dict[Request, tuple[int, int]] = field(default_factory=dict, hash=False)
    flushes: list[tuple[Request, dict[int, int]]] = field(default_factory=list)
    done: dict[int, int] = field(default_factory=dict)  # the last write of a block that was completed

    def write(self, block: int) -> None:
        if any(block == at for at, _ in self.writes.values()):
            return  # in flight: which of the two would be the last is nobody's promise
        self.seeds[0] += 1
        self.allowed[block].append(self.seeds[0])
        request = self.frontend.write(block * SPREAD * BLOCK, pattern(self.seeds[0]))
        self.writes[request] = (block, self.seeds[0])

    def flush(self) -> None:
        if len(self.flushes) < 8:
            self.flushes.append((self.frontend.flush(), dict(self.done)))

    def listen(self) -> None:
        self.frontend.poll()
        for request in [each for each in self.writes if each.done]:
            block, seed = self.writes.pop(request)
            if request.ok:
                self.done[block] = seed
            self.frontend.recycle(request)
        for flush, covers in [each for each in self.flushes if each[0].done]:
            self.flushes.remove((flush, covers))
            for block, seed in covers.items() if flush.ok else ():
                kept = self.allowed[block]
                if seed in kept:
                    self.allowed[block] = kept[kept.index(seed):]

    def is_idle(self) -> bool:
        return not self.writes and not self.flushes


def sector(seed: int) -> bytes:
    return pattern(seed)[:512] if seed else bytes(512)


def sectors_found(disk: MemoryDisk, block: int, cut: Cut) -> set[bytes]:
    found = disk.read(block * SPREAD * BLOCK, BLOCK, cut)
    return {found[at : at + 512] for at in range(0, BLOCK, 512)}  # a write that failed may be torn


def check_flushed(disk: MemoryDisk, allowed: Mapping[int, list[int]], what: str, cut: Cut) -> None:
    """Each block holds what the guest may find there (Guest.allowed)."""
    for block, seeds in allowed.items():
        strange = sectors_found(disk, block, cut) - {sector(seed) for seed in seeds}
        assert not strange, f"{what} lacks block {block}: {[each[:8] for each in strange]}, not of {seeds}"


class Gone(AsyncTransport):
    """The backend was killed."""

    def __init__(self) -> None:
        pass

    def close(self) -> None:
        pass


async def let_go(guest: Guest, patience_s: float) -> None:
    """The guest stops, and has its last answers."""
    with anyio.fail_after(patience_s):
        await anyio.to_thread.run_sync(guest.frontend.stop)
        guest.listen()
        await anyio.to_thread.run_sync(guest.frontend.close)


async def end_process(
    engine: Engine, mirror: Mirror, guest: Guest, bitmap: BitmapFile | None, *, killed: bool
) -> None:
    with anyio.CancelScope(shield=True):
        await engine.close()
        if killed:
            guest.listen()
            guest.frontend.transport = Gone()
            guest.frontend.close()
        else:
            await anyio.to_thread.run_sync(mirror.record_clean)
        if bitmap is not None:
            bitmap.close(clean=not killed)
