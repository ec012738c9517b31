# SPDX-License-Identifier: Apache-2.0
"""Ranges of the source that are not to be trusted (docs/durability.md, rule 5): in doubt, because a write
failed there; unreadable, because the copy could not read them, so that the destination lacks them. They stand
in the way of a switch, unless the operator accepts them."""

from dataclasses import dataclass

from vhostsync.engine.engine import Engine
from vhostsync.engine.snapshot import Snapshot
from vhostsync.errors import SwitchError

Range = dict[str, int]


def rows(ranges: tuple[tuple[int, int], ...]) -> list[Range]:
    """As the control socket shows them."""
    return [{"offset": offset, "length": length} for offset, length in ranges]


def within(ranges: tuple[tuple[int, int], ...], capacity_bytes: int) -> tuple[tuple[int, int], ...]:
    """What of them the disk has."""
    return tuple(
        (offset, min(length, capacity_bytes - offset)) for offset, length in ranges if offset < capacity_bytes
    )


@dataclass(frozen=True)
class BadRanges:
    """`doubt` and `unreadable`: (offset, length) in bytes."""

    doubt: tuple[tuple[int, int], ...] = ()
    unreadable: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, snapshot: Snapshot) -> "BadRanges":
        return cls(snapshot.doubt, snapshot.unreadable)

    def __bool__(self) -> bool:
        return bool(self.doubt or self.unreadable)

    def listed(self) -> dict[str, list[Range]]:
        return {"doubt": rows(self.doubt), "unreadable": rows(self.unreadable)}

    def check_switch(self, *, accept: bool, keep_mirror: bool) -> None:
        """SwitchError where they forbid one."""
        if not self or (accept and not keep_mirror):
            return
        if accept:
            raise SwitchError(
                "the two disks may differ where the source is in doubt or unreadable, so the old one cannot "
                "become the mirror: leave out keep-mirror, and mirror to it (mirror start --full) afterwards"
            )
        what = []
        if self.doubt:
            what.append(
                f"writes to the source failed in {len(self.doubt)} range(s), so that what they hold is in "
                f"doubt"
            )
        if self.unreadable:
            what.append(
                f"{len(self.unreadable)} range(s) of the source could not be read, so that the destination "
                f"lacks them"
            )
        raise SwitchError(
            f"{', and '.join(what)} (query-mirror lists them); the guest has to write there again first, or "
            f"accept what the destination holds there (switch --accept-unreadable)"
        )


async def why_no_copy(engine: Engine, different_since: str | None) -> str | None:
    """Of a destination that is steady; None: it is a copy of the guest's disk."""
    if different_since is not None:
        return (
            f"a verification has found (known since {different_since}) that the destination differs from the "
            f"guest's disk; mend it first (verify --repair)"
        )
    if BadRanges.of(await engine.snapshot()):
        return (
            "the destination lacks what could not be read from, or written to, the guest's disk (status "
            "lists the ranges); the guest has to write there again first"
        )
    return None
