# SPDX-License-Identifier: Apache-2.0
"""`vhostsync record`: what the state records say, without a backend: which disk is the truth, where both are
and in which condition, what the other one is worth, what is in doubt, who uses it, and which command comes
next. Nothing is changed (but by --forget). Everything here blocks.

A start whose disk does not answer asks the same (`good_copy`)."""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from vhostsync.errors import StateRecordError
from vhostsync.host.flocks import lock_holder
from vhostsync.printable import printable_lines
from vhostsync.record.files import RealFileSystem
from vhostsync.record.names import Lineage, Names, find_name
from vhostsync.record.state_file import StateFile, backend_link, remove_backend_link
from vhostsync.record.state_index import RECORD_SUFFIX, Index, default_directory
from vhostsync.record.state_record import StateRecord, Superseded, Worth, named
from vhostsync.storage.condition import Condition, Look
from vhostsync.storage.identity import DiskIdentity, Likeness
from vhostsync.storage.kinds import identify
from vhostsync.storage.look import look

log = structlog.get_logger(__name__)

Looker = Callable[[DiskIdentity], Look]


@dataclass(frozen=True)
class Advice:
    """What to do next: in words, and the command, if there is one."""

    text: str
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """One record, and how its disks look now."""

    path: Path
    record: StateRecord
    current: Look
    peer: Look | None
    backend: int | None  # the process that uses the record
    advice: Advice
    name: str | None = None  # of the lineage

    @property
    def good(self) -> DiskIdentity | None:
        """The disk to go on with, if it is there."""
        if self.current.usable:
            return self.record.current
        peer = self.record.peer
        good = peer is not None and self.record.peer_worth is not Worth.INCONSISTENT
        return peer if good and self.peer is not None and self.peer.usable else None


def report(
    path: Path, looker: Looker = look, names: Sequence[Lineage] | None = None
) -> Report | None:
    """None where there is no record. StateRecordError when it is damaged. `names`: all of its directory, for
    who asks for many records."""
    record = StateFile(path).load()
    if record is None:
        return None
    current = looker(record.current)
    peer = looker(record.peer) if record.peer is not None else None
    backend = lock_holder(Path(f"{path}.lock"))
    names = names if names is not None else Names(path.parent).all()
    name = next((each.name for each in names if each.record.name == path.name), None)
    advice = advise(path, record, current, peer, backend, name)
    return Report(path, record, current, peer, backend, advice, name)


# ---- what comes next ---------------------------------------------------------------


def advise(
    place: Path, record: StateRecord, current: Look, peer: Look | None, backend: int | None,
    name: str | None = None,
) -> Advice:
    """`place`: of the record. `name`: of the lineage, by which it is served."""
    path = record.current.path

    def serve(disk: str, *options: str) -> tuple[str, ...]:
        by_name = () if name is None else ("--name", name)
        by_path = () if name is not None and disk == path else ("--blk-file", disk)
        return ("vhostsync", "serve", *by_name, *by_path, *options)

    if backend is not None:
        control = linked_socket(place) or socket_by_command(backend)
        text = f"a backend runs (pid {backend}); ask it"
        return Advice(text, ("vhostsync", "status", *(("--control", str(control)) if control else ())))
    if current.users:
        return Advice(f"end what uses {path}, then start with it", serve(path))
    if current.usable and not (current.condition is Condition.UNSURE and record.at_stake):
        return Advice("start with the current disk", serve(path))
    if current.usable:
        return Advice(
            f"if the disk at {path} is the one (moved, or its file system numbered anew), say so",
            serve(path, "--same-disk"),
        )
    lost = f"bring {path} back, or, if it is lost for good,"
    if record.peer is None or peer is None:
        return Advice(f"{lost} promote a backup", serve("BACKUP", "--promote"))
    copy = record.peer.path
    if record.peer_worth is Worth.INCONSISTENT:
        text = f"{lost} promote a backup: {copy} is a copy that did not end, and of no use"
        return Advice(text, serve("BACKUP", "--promote"))
    promoting = serve(copy, "--promote")
    if not peer.usable:
        return Advice(f"{lost} bring back {copy}, which {_worth(record)}, and promote it", promoting)
    return Advice(f"{lost} promote {copy}, which {_worth(record)}", promoting)


def _former(old: Superseded) -> str:
    if old.worth is Worth.INCONSISTENT:
        return "the other half of a mirror once, and a copy that did not end"
    if old.worth is not None:
        return f"the other half of a mirror once, {old.worth} since {old.since or 'an unknown moment'}"
    how = "given up as lost" if old.lost else "superseded by a switch"
    return f"{how} at {old.since}" if old.since else how


def _worth(record: StateRecord) -> str:
    moment = record.outdated_since or "an unknown moment"
    words = {
        Worth.UP_TO_DATE: "is up to date: it lacks nothing that was flushed",
        Worth.OUTDATED: f"is the disk as of {moment}, without what the guest wrote since",
        Worth.INCONSISTENT: "is a copy that did not end, and of no use",
    }
    assert record.peer_worth is not None
    return words[record.peer_worth]


def good_copy(disk: str, places: Iterable[Path], looker: Looker = look) -> str | None:
    """What to tell whoever started with this disk, which cannot be opened: where its guest's data is and
    how to go on; None where no record has its name for its current disk."""
    for place in places:
        try:
            record = StateFile(place).load()
            if record is None or record.current.path != disk:
                continue
            found = report(place, looker)
        except StateRecordError:
            continue
        if found is None:
            continue
        if found.backend is None and not found.current.usable:
            return f"{found.advice.text}: {shlex.join(found.advice.command)} (says {named(place)})"
    return None


# ---- which records -------------------------------------------------------------------


def records_in(directory: Path) -> list[Path]:
    try:
        return sorted(each for each in directory.iterdir() if each.name.endswith(RECORD_SUFFIX))
    except FileNotFoundError:
        return []
    except OSError as error:
        reason = f"the state records in {directory} cannot be listed: {error.strerror}"
        raise StateRecordError(reason) from error


def find(where: str | None, directory: Path) -> list[Path]:
    """The records that `where` means: a record itself, a directory of them, a disk, or (None) all."""
    if where is None:
        return records_in(directory)
    if Path(where).is_dir():
        return records_in(Path(where))
    if _is_record(Path(where)):
        return [Path(where)]
    return [path for path in records_in(directory) if _knows(path, where)]


def _is_record(path: Path) -> bool:
    if path.name.endswith(RECORD_SUFFIX):
        return path.exists()
    try:
        with path.open("rb") as file:
            return path.is_file() and b'"state-record"' in file.read(64)
    except OSError:
        return False


def _knows(record_path: Path, disk: str) -> bool:
    """By what the disk is, or by its name: it may be dead, or gone."""
    try:
        record = StateFile(record_path).load()
    except StateRecordError as error:
        log.warning("a state record is passed over", path=str(record_path), reason=str(error))
        return False
    if record is None:
        return False
    return any(each.path == disk or _is(each, disk) for each in record.disks)


def _is(known: DiskIdentity, disk: str) -> bool:
    try:
        return known.likeness(identify(disk)) is Likeness.SAME
    except OSError:
        return False


def forget(path: Path) -> None:
    """Removes a record and what leads to it. From then on nobody knows which of its disks is the current one.
    StateRecordError while a backend uses it."""
    with StateFile(path) as record:
        record.lock(timeout_s=0)
        try:
            for pointer in Index(path.parent, RealFileSystem()).pointers():
                if pointer.record.name == path.name:
                    pointer.path.unlink()
            Names(path.parent).forget_record(path)
            path.unlink(missing_ok=True)
            remove_backend_link(path)
            Path(f"{path}.lock").unlink(missing_ok=True)
            RealFileSystem().sync_directory(path.parent)
        except OSError as error:
            raise StateRecordError(f"{path} cannot be removed: {error.strerror}") from error


# ---- who uses a record -----------------------------------------------------------------


def linked_socket(record: Path) -> Path | None:
    """Of the backend that holds the record's lock: where the link beside the record says that it listens.
    Only found_socket.py makes certain of it."""
    with suppress(OSError):
        return backend_link(record).readlink()
    return None


def socket_by_command(pid: int) -> Path | None:
    """The same by its command line: an earlier version has no link, but was not forked from a node."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    text = " ".join(words)
    for option, suffix in (("--control", ""), ("--socket-path", ".control")):
        found = re.search(rf"(?:^| ){option}[ =](\S+)", text)
        if found:
            return Path(found[1] + suffix)
    return None


# ---- shown -----------------------------------------------------------------------------------


def in_json(found: Report) -> dict[str, Any]:
    record = found.record

    def disk(identity: DiskIdentity, seen: Look) -> dict[str, Any]:
        return {
            "path": identity.path, "bytes": identity.bytes, "condition": str(seen.condition),
            "reason": seen.reason, "users": list(seen.users),
        }  # fmt: skip

    peer = None
    if record.peer is not None and found.peer is not None and record.peer_worth is not None:
        peer = {
            **disk(record.peer, found.peer), "worth": str(record.peer_worth),
            "outdated-since": record.outdated_since,
        }  # fmt: skip
    return {
        "record": str(found.path),
        "name": found.name,
        "epoch": record.epoch,
        "current": disk(record.current, found.current),
        "other": peer,
        "superseded": [
            {"path": old.disk.path, "since": old.since, "lost": old.lost, "worth": old.worth}
            for old in record.superseded
        ],
        "doubt": [{"offset": offset, "length": length} for offset, length in record.doubt],
        "wanted": record.wanted.path if record.wanted is not None else None,
        "clean": record.clean,
        "backend": found.backend,
        "good": found.good.path if found.good is not None else None,
        "next": {"text": found.advice.text, "command": list(found.advice.command)},
    }


def in_text(found: Report) -> str:
    record = found.record
    rows = [("Name", found.name)] if found.name is not None else []
    rows += [
        ("Record", f"{found.path}, epoch {record.epoch}"),
        ("Current", f"{record.current.path}: {found.current.in_words()}"),
    ]
    if record.peer is not None and found.peer is not None:
        rows += [("Other", f"{record.peer.path}: {found.peer.in_words()}"), ("", f"it {_worth(record)}")]
    for old in record.superseded:
        rows.append(("Former", f"{old.disk.path}: {_former(old)}"))
    for offset, length in record.doubt:
        text = f"{length} bytes of the current disk from {offset} on: a write failed there"
        rows.append(("In doubt", text))
    if record.wanted is not None:
        rows.append(("Mirror", f"the next start resumes it to {record.wanted.path}"))
    if found.backend is None:
        end = "in order" if record.clean else "not in order: the backend or the host crashed"
        rows.append(("Last end", end))
    rows.append(("Next", found.advice.text))
    if found.advice.command:
        rows.append(("", f"  {shlex.join(found.advice.command)}"))
    return "".join(f"{name:<12} {text}\n" for name, text in rows)


def run(where: str | None, name: str | None = None, *, as_json: bool, remove: bool) -> int:
    """`vhostsync record`; the exit code. `name`: of the lineage, instead of a path."""
    directory = default_directory()
    if name is not None:
        where = str(find_name(name, directory).record)
    found = find(where, directory)
    if not found:
        what = "no state record" if where is None else f"no state record that knows {where}"
        raise StateRecordError(
            f"there is {what} in {directory}; if it is kept elsewhere (--state-file, or a service's "
            f"STATE_DIRECTORY), name the record or its directory"
        )
    if remove:
        return _forget_one(where, found)
    reports, failed = [], 0
    names = {each: Names(each).all() for each in {path.parent for path in found}}
    for path in found:
        try:
            if (one := report(path, look, names[path.parent])) is not None:
                reports.append(one)
        except StateRecordError as error:
            failed += 1
            sys.stderr.write(f"vhostsync: {error}\n")
    if as_json:
        sys.stdout.write(json.dumps([in_json(one) for one in reports]) + "\n")
    else:
        sys.stdout.write("\n".join(printable_lines(in_text(one)) for one in reports))
    return 1 if failed else 0


def _forget_one(where: str | None, found: list[Path]) -> int:
    if where is None or len(found) != 1:
        raise StateRecordError(f"name the one record that is to be forgotten: {', '.join(map(str, found))}")
    forget(found[0])
    sys.stdout.write(f"forgotten: {found[0]}; a start with any of its disks begins a new record\n")
    return 0
