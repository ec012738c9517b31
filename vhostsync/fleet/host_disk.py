# SPDX-License-Identifier: Apache-2.0
"""One disk of this host, as it is known by its record and by what its backend has answered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vhostsync.control.found_socket import Control, FoundSocket
from vhostsync.record.state_record import StateRecord

Answer = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class HostDisk:
    """One disk of this host. `name` and `group` are those that `vhostsync create` has given it; `record` is
    None where nothing could be read. `control`: where its backend listens. `status` and `mirror` are what it
    has answered (query-status, query-mirror); None: none runs, or it does not answer (`problem`). `in_use`: a
    process holds the record's lock. `settled`: it was not written just now. `passing`: why there was no
    answer, where there may be one in a moment. `real_record`: where the record is in truth, and `said`: where
    that is of which the backend says that it uses it."""

    name: str | None = None
    group: str | None = None
    record_path: Path | None = None
    record: StateRecord | None = None
    in_use: bool = False
    settled: bool = True
    real_record: str | None = None
    control: Control | None = None
    passing: str | None = None
    said: str | None = None
    status: Answer | None = None
    mirror: Answer | None = None
    problem: str | None = None

    @property
    def running(self) -> bool:
        return self.status is not None

    @property
    def own(self) -> str | None:
        """Its record, as it is told from others."""
        if self.real_record is not None or self.record_path is None:
            return self.real_record
        return str(self.record_path)

    @property
    def places(self) -> Sequence[Path]:
        """Where its backend may listen."""
        if isinstance(self.control, FoundSocket):
            return self.control.places
        return () if self.control is None else (self.control,)

    @property
    def holder_known(self) -> bool:
        """Where the process that holds the record's lock listens. Then nobody else is asked
        (found_socket.py)."""
        return self.in_use and self.control is not None

    def may_come_back(self, looked: int) -> bool:
        """It seems to be between two backends, after so many looks. (One that has no control socket at all is
        not waited for.)"""
        silent = self.status is None and self.problem is None and self.record_path is not None
        begins = self.in_use and self.control is None and looked == 1
        return self.passing is not None or (silent and (begins or not self.settled))

    @property
    def shown_name(self) -> str:
        """What people call it: its name, else what its backend is called, else the record."""
        if self.name is not None:
            return self.name
        label = str(self.status["name"]) if self.status is not None else ""
        if label or self.record_path is None:
            return label or str(self.control)
        return self.record_path.name

    @property
    def state(self) -> str:
        """Of the mirror, where a backend runs; else `stopped`, or `unknown` where it cannot be told."""
        if self.mirror is not None:
            return str(self.mirror["state"])
        return "stopped" if self.problem is None else "unknown"

    @property
    def disk(self) -> str | None:
        """The current one."""
        if self.status is not None:
            return str(self.status["disk"])
        return self.record.current.path if self.record is not None else None

    @property
    def other(self) -> str | None:
        """The destination, or the last one."""
        if self.mirror is not None:
            return None if self.mirror["destination"] is None else str(self.mirror["destination"])
        peer = self.record.peer if self.record is not None else None
        return peer.path if peer is not None else None

    @property
    def worth(self) -> str | None:
        """Of that, if the current disk were lost now."""
        if self.mirror is not None:
            return None if self.mirror["worth"] is None else str(self.mirror["worth"])
        worth = self.record.peer_worth if self.record is not None else None
        return str(worth) if worth is not None else None

    @property
    def guest(self) -> str | None:
        """`runs` (it has the disk in use), `connected`, `none`; None: no backend runs."""
        if self.status is None:
            return None
        if self.status["active"]:
            return "runs"
        return "connected" if self.status["frontends"] else "none"

    def in_json(self) -> dict[str, Any]:
        mirror = self.mirror or {}
        return {
            "name": self.name,
            "group": self.group,
            "label": self.shown_name,
            "running": self.running,
            "state": self.state,
            "disk": self.disk,
            "other": self.other,
            "worth": self.worth,
            "guest": self.guest,
            "lag-bytes": mirror.get("lag-bytes"),
            "lag-ms": mirror.get("lag-ms"),
            "capacity": self.status["capacity"] if self.status is not None else None,
            "copy-bytes-done": mirror.get("copy-bytes-done"),
            "copy-bytes-total": mirror.get("copy-bytes-total"),
            "copy-remaining-s": mirror.get("copy-remaining-s"),
            "last-error": mirror.get("last-error"),
            "control": str(self.control) if self.control is not None else None,
            "record": str(self.record_path) if self.record_path is not None else None,
            "problem": self.problem,
        }
