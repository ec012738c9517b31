# SPDX-License-Identifier: Apache-2.0
"""A guest that writes a counter to two disks in turn, with a flush after each write, while snapshots of both
are taken again and again: in none of them do the disks differ by more than the one write that a power cut at
that instant could have left undone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.daemon.group_rig import Counter, counted
from tests.daemon.named_host import Host
from tests.daemon.rig import image
from tests.frontend import Frontend
from tests.groups.pairs import DISKS, Pair


@dataclass(frozen=True)
class Served:
    host: Host
    name: str

    def guest(self) -> Frontend:
        return self.host.guest(self.name)


@dataclass
class Verdict:
    sets: int = 0
    writes: int = 0
    pauses_us: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        middle_ms = sorted(self.pauses_us)[self.sets // 2] / 1000
        most_ms = max(self.pauses_us) / 1000
        return (
            f"{self.sets} sets of both disks, none more than one write apart; {self.writes:,} writes, each "
            f"flushed; pauses of {middle_ms:.1f} ms in the middle, {most_ms:.1f} ms at most"
        )


def prove(work: Path, times: int, *, writes_between: int = 20) -> Verdict:
    verdict = Verdict()
    host = Host(work)
    served: Any = [Served(host, name) for name in DISKS]
    with (
        Pair(host, lambda path: image(path, 8, filled_mib=0)) as pair,
        Counter(served, flush_every=1) as guest,
    ):
        for count in range(times):
            guest.go_on(writes_between)
            before = guest.written
            result = pair.snapshot()
            after = guest.written + 1
            found = [counted(other) for other in pair.others]
            assert abs(found[0] - found[1]) == 1, f"snapshot {count}: {found} were never there at once"
            assert before <= max(found) <= after, f"snapshot {count}: {found}, not of {before} to {after}"
            guest.go_on(2)
            assert [counted(other) for other in pair.others] == found, f"snapshot {count} was written to"
            verdict.sets += 1
            verdict.pauses_us.append(result["pause-us"])
            pair.mirror_again()
        verdict.writes = guest.stop()
    return verdict
