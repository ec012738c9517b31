# SPDX-License-Identifier: Apache-2.0
"""What a long run has done and seen, and whether a backend holds more and more."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tests.holding import Holding

DESCRIPTORS_GROWN_MAX = 0
MAPPINGS_GROWN_MAX = 16
"""A further worker thread has a stack and an area of the allocator: 5 or 6 mappings. What each cycle maps
and leaves shows in a life of 25 cycles all the same."""
THREADS_GROWN_MAX = 6
"""Workers for calls that block are made when they are needed, and end when they are not."""
MEMORY_GROWN_MAX_KIB = 4 << 10
MEMORY_BESIDE_LOG_MAX_KIB = 60 << 10


@dataclass
class Life:
    """One backend process: what it held in the same state, `passthrough` and settled, cycle after cycle."""

    pid: int
    samples: list[Holding] = field(default_factory=list)

    def leaks(self, log_kib: int) -> list[str]:
        if not self.samples:
            return []
        first, last = self.samples[0], self.samples[-1]
        bounds = (
            ("descriptors", last.descriptors - first.descriptors, DESCRIPTORS_GROWN_MAX),
            ("threads", last.threads - first.threads, THREADS_GROWN_MAX),
            ("mappings", last.mappings - first.mappings, MAPPINGS_GROWN_MAX),
            ("KiB of memory", last.memory_kib - first.memory_kib, MEMORY_GROWN_MAX_KIB),
        )
        found = [
            f"process {self.pid}: {grown} more {what} after {len(self.samples)} cycles than after the first"
            for what, grown, allowed in bounds
            if grown > allowed
        ]
        most = max(sample.memory_kib + sample.areas_kib for sample in self.samples)
        if most > MEMORY_BESIDE_LOG_MAX_KIB + log_kib:
            found.append(f"process {self.pid}: {most} KiB, a log of {log_kib} KiB among them")
        return found


@dataclass
class Figures:
    seed: int
    log_kib: int
    minutes: float = 0.0
    cycles: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    engine_requests: int = 0
    guest_writes: int = 0
    guest_syncs: int = 0
    slowest_write_ms: float = 0.0
    bytes_verified_in_guest: int = 0
    bytes_verified_on_host: int = 0
    bytes_compared_by_backend: int = 0
    verifications: int = 0
    losses: int = 0
    guest_io_errors: list[str] = field(default_factory=list)
    failure: str | None = None
    lives: list[Life] = field(default_factory=list)

    @property
    def leaks(self) -> list[str]:
        return [leak for life in self.lives for leak in life.leaks(self.log_kib)]

    @property
    def good(self) -> bool:
        return not (self.losses or self.leaks or self.guest_io_errors or self.failure)

    def as_json(self) -> dict[str, Any]:
        # `asdict` makes nonsense of a Counter.
        plain = replace(self, faults=Counter(), done=Counter())
        return {**asdict(plain), "faults": dict(self.faults), "done": dict(self.done), "leaks": self.leaks}

    def line(self) -> str:
        """How far it is."""
        return (
            f"{self.cycles} cycles, {self.faults.total()} faults, {self.engine_requests:,} requests, "
            f"{self.verifications} verifications, losses {self.losses}, leaks {len(self.leaks)}"
        )

    def _longest_life(self) -> list[str]:
        longest = max(self.lives, key=lambda life: len(life.samples), default=None)
        if longest is None or not longest.samples:
            return []
        first, last = longest.samples[0], longest.samples[-1]
        names = ("descriptors", "mappings", "threads", "memory_kib", "areas_kib")
        return [
            f"| longest life: cycles | {len(longest.samples)} |",
            *(
                f"| {name} after its first and last cycle | {getattr(first, name)}, {getattr(last, name)} |"
                for name in names
            ),
        ]

    def table(self) -> str:
        samples = [sample for life in self.lives for sample in life.samples]
        most = max((sample.memory_kib + sample.areas_kib for sample in samples), default=0)
        looked_at = sum(len(life.samples) > 1 for life in self.lives)
        rows = [
            "| what | figure |",
            "| --- | --- |",
            f"| seed, minutes, cycles | {self.seed}, {self.minutes:.1f}, {self.cycles} |",
            *(f"| fault: {name} | {count} |" for name, count in sorted(self.faults.items())),
            f"| faults in all | {self.faults.total()} |",
            *(f"| done: {name} | {count} |" for name, count in sorted(self.done.items())),
            f"| requests of the guest that the backends answered | {self.engine_requests:,} |",
            f"| verified writes, syncs of the guest | {self.guest_writes:,}, {self.guest_syncs:,} |",
            f"| longest write of the guest, ms | {self.slowest_write_ms:,.0f} |",
            f"| verifications | {self.verifications} |",
            f"| MiB verified in the guest | {self.bytes_verified_in_guest >> 20:,} |",
            f"| MiB verified on the host | {self.bytes_verified_on_host >> 20:,} |",
            f"| MiB compared by the backend | {self.bytes_compared_by_backend >> 20:,} |",
            f"| losses | {self.losses} |",
            f"| I/O errors in the guest | {len(self.guest_io_errors)} |",
            f"| leaks | {len(self.leaks)} |",
            f"| backend processes, looked at for leaks | {len(self.lives)}, {looked_at} |",
            *self._longest_life(),
            f"| most memory, KiB, a log of {self.log_kib} among them | {most:,} |",
        ]
        return "\n".join(rows)
