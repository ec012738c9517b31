# SPDX-License-Identifier: Apache-2.0
"""Disks that are nowhere, and a file system in memory that loses what was not synced."""

from dataclasses import replace
from pathlib import Path, PurePath

from hypothesis import strategies as st

from vhostsync.storage.identity import DiskIdentity


def disk(
    name: str, inode: int = 0, *, generation: int | None = 1, ctime_ns: int | None = None
) -> DiskIdentity:
    number = inode or sum(name.encode())
    return DiskIdentity(
        f"/disks/{name}", "file", 7, number, 1 << 30, ctime_ns, generation, file_system="fs", boot_id="now"
    )


A, B, C = disk("a"), disk("b"), disk("c")

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
"""Of which a path may be."""

identities = st.builds(
    DiskIdentity,
    path=st.text(CHARACTERS, min_size=1, max_size=20).map(lambda name: f"/{name}"),
    kind=st.sampled_from(["file", "block"]),
    device=st.integers(0, 3),
    inode=st.integers(0, 3),
    bytes=st.integers(0, 1 << 63),
    ctime_ns=st.none() | st.integers(0, 1 << 63),
    generation=st.none() | st.integers(0, 3),
    serial=st.none() | st.sampled_from("xyz"),
    wwn=st.none() | st.sampled_from("xyz"),
    partuuid=st.none() | st.sampled_from("xyz"),
    file_system=st.none() | st.sampled_from("xyz"),
    boot_id=st.none() | st.sampled_from("xyz"),
    mark=st.none() | st.sampled_from("xyz"),
    place=st.none() | st.sampled_from("xyz"),
    disk_sequence=st.none() | st.integers(0, 3),
).flatmap(lambda found: st.sampled_from([found, replace(found, mark_is_set=found.mark is not None)]))


class CrashError(BaseException):
    """The power went."""


class VolatileFileSystem:
    """Files in memory with what a power cut may do: names and contents are kept apart; content that was not
    fsynced may be lost in part, names changed since the directory's fsync may be old or new, each by itself.
    Every step, within a call too, is a place to crash."""

    def __init__(self) -> None:
        self.names_now: dict[PurePath, int] = {}
        self.contents: dict[int, bytes] = {}
        self.durable: dict[int, bytes] = {}
        self.changes: list[dict[PurePath, int]] = [{}]  # the directory, oldest (durable) first
        self.steps_left = 1 << 30
        self.cuts = 0

    def _step(self) -> None:
        if self.steps_left == 0:
            raise CrashError
        self.steps_left -= 1

    def _changed(self) -> None:
        self.changes.append(dict(self.names_now))

    def read(self, path: Path) -> bytes:
        if path not in self.names_now:
            raise FileNotFoundError(path)
        return self.contents[self.names_now[path]]

    def read_version(self, path: Path) -> tuple[bytes, object]:
        text = self.read(path)
        return text, self.versions(path.parent, path.name)[path.name]

    def write_durable(self, path: Path, text: bytes) -> None:
        self._step()
        inode = len(self.contents)
        self.contents[inode] = self.durable[inode] = b""
        self.names_now[path] = inode
        self._changed()
        for at in range(0, len(text), max(1, len(text) // 3)):
            self._step()
            self.contents[inode] = text[: at + max(1, len(text) // 3)]
        self._step()
        self.durable[inode] = self.contents[inode]
        self._step()

    def rename(self, old: Path, new: Path) -> None:
        self._step()
        self.names_now[new] = self.names_now.pop(old)
        self._changed()
        self._step()

    def unlink(self, path: Path) -> None:
        self._step()
        del self.names_now[path]
        self._changed()

    def sync_directory(self, path: Path) -> None:
        self._step()
        self.changes = [dict(self.names_now)]
        self._step()

    def names(self, path: Path) -> list[str]:
        return sorted(name.name for name in self.names_now)

    def versions(self, path: Path, suffix: str) -> dict[str, object]:
        there = sorted(self.names_now.items())
        return {name.name: (self, self.cuts, inode) for name, inode in there if name.name.endswith(suffix)}

    def power_cut(self, data: st.DataObject) -> None:
        self.steps_left = 1 << 30
        self.cuts += 1
        cut: dict[PurePath, int] = {}
        for name in sorted({name for state in self.changes for name in state}):
            inodes = list(dict.fromkeys(state.get(name) for state in self.changes))
            inode = inodes[0] if len(inodes) == 1 else data.draw(st.sampled_from(inodes), label=f"{name}")
            if inode is not None:
                cut[name] = inode
        self.names_now = cut
        self.changes = [dict(self.names_now)]
        for inode in set(self.names_now.values()):
            durable, volatile = self.durable[inode], self.contents[inode]
            length = data.draw(st.integers(len(durable), max(len(durable), len(volatile))), label="content")
            self.contents[inode] = self.durable[inode] = (
                volatile[:length] if length > len(durable) else durable
            )
