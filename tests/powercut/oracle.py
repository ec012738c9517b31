# SPDX-License-Identifier: Apache-2.0
"""What the guest may find after a power cut: of each sector, every version that was issued and that no write
which was promised to be durable has superseded.

A write is promised when a flush that was submitted after its completion is confirmed (or at once: a
write-through guest; a process that is killed and not the machine). It supersedes what was completed before it
was submitted. What was in flight beside it may have come after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.powercut.recorder import Confirmed, GuestRequest, Submitted


class Oracle:
    """Fed with the guest's notes in their order. `promise_at_once`: completed is promised."""

    def __init__(self, initial: Sequence[int], *, promise_at_once: bool) -> None:
        self._initial = initial
        self._promise_at_once = promise_at_once
        self._issued: dict[int, list[GuestRequest]] = {}  # by sector
        self._initial_gone: set[int] = set()
        self._completed: list[GuestRequest] = []  # and not promised yet
        self._covered: dict[GuestRequest, tuple[GuestRequest, ...]] = {}  # by flush
        self._promised: set[GuestRequest] = set()
        self._promised_at: dict[int, int] = {}  # by sector: where the latest promised write was submitted

    def allowed(self, sector: int) -> set[int]:
        tags = {request.tag_at(sector) for request in self._issued.get(sector, ())}
        if sector not in self._initial_gone:
            tags.add(self._initial[sector])
        return tags

    def is_promised(self, sector: int, tag: int) -> bool:
        """No write that leaves this tag there may still be lost."""
        return all(
            request in self._promised
            for request in self._issued.get(sector, ())
            if request.tag_at(sector) == tag
        )

    def promised_since(self, sector: int, place: int) -> bool:
        """A write that was submitted after `place`."""
        return self._promised_at.get(sector, -1) > place

    def alone(self, request: GuestRequest, sector: int) -> bool:
        """No other write to the sector was in flight beside this one."""
        return all(
            other is request or 0 <= other.confirmed_at < request.submitted_at
            for other in self._issued.get(sector, ())
        )

    def apply(self, note: Submitted | Confirmed, place: int) -> Iterable[int]:
        """The sectors of which more or less is allowed from here on."""
        request = note.request
        if isinstance(note, Submitted):
            request.submitted_at = place
            sectors = range(request.first, request.first + request.count)
            for sector in sectors:
                self._issued.setdefault(sector, []).append(request)
            if not request.count:
                self._covered[request] = tuple(self._completed)
            return sectors
        request.confirmed_at = place
        if not request.ok:
            return ()
        if not request.count:
            return self._promise(self._covered.pop(request))
        if request.write_through or self._promise_at_once:
            return self._promise((request,))
        self._completed.append(request)
        return ()

    def _promise(self, requests: Iterable[GuestRequest]) -> set[int]:
        less = set()
        promised = set(requests)
        self._completed = [request for request in self._completed if request not in promised]
        self._promised |= promised
        for request in promised:
            for sector in range(request.first, request.first + request.count):
                less.add(sector)
                self._initial_gone.add(sector)
                self._promised_at[sector] = max(self._promised_at.get(sector, -1), request.submitted_at)
                self._issued[sector] = [
                    other
                    for other in self._issued[sector]
                    if not 0 <= other.confirmed_at < request.submitted_at
                ]
        return less
