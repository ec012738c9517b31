# SPDX-License-Identifier: Apache-2.0
"""The floors of c_shim/ (the table in its meson.build): a file includes what lies on its own floor or on
one that it may use, by name alone; a symbol is taken only from there, too (tests/c/symbols.py)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.c.symbols import Floor, strays

C_SHIM = Path(__file__).parents[2] / "c_shim"
TABLE = (C_SHIM / "meson.build").read_text()
FLOORS = {
    name: {each.strip(" '") for each in uses.split(",") if each.strip()}
    for name, uses in re.findall(r"^  \['(\w+)', \[(.*?)\], files\($", TABLE, re.MULTILINE)
}
SOURCES = sorted(C_SHIM.rglob("*.[ch]"))
FOLDER = {path.name: path.parent.name for path in SOURCES}
"""By the name of a file. That of the border to Python is c_shim itself."""


HOUSE = [C_SHIM.name, "base", "order", "disk", "virtio", "bitmap", "mirror", "guest", "engine", "testing"]
"""Lowest first."""

# What is left to be untangled: these numbers only fall.
FILES_IN_CIRCLES = 19
ARROWS_UP = 26
LINES = 550


def includes(path: Path) -> Iterator[str]:
    yield from re.findall(r'^\s*#\s*include\s+"(.*?)"', path.read_text(), re.MULTILINE)


def test_a_floor_uses_lower_floors_alone() -> None:
    assert list(FLOORS)[:5] == ["base", "order", "disk", "virtio", "bitmap"]
    lower: set[str] = set()
    for name, uses in FLOORS.items():
        assert uses <= lower, f"{name} uses {uses - lower}"
        lower.add(name)
    for sibling in ("order", "disk", "virtio"):
        assert FLOORS[sibling] == {"base"}


def test_the_name_of_a_file_is_its_own() -> None:
    assert len(FOLDER) == len(SOURCES)


def test_every_c_file_is_built() -> None:
    built = set(re.findall(r"'(\w+/\w+\.c)'", TABLE))
    assert built == {path.relative_to(C_SHIM).as_posix() for path in SOURCES if path.suffix == ".c"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_includes_what_its_floor_may_use(path: Path) -> None:
    for name in includes(path):
        folder = FOLDER.get(name)
        assert folder is not None, f"{name} is no file of c_shim, or it is named with a folder"
        if (floor := FLOORS.get(path.parent.name)) is not None:
            assert folder in {*floor, path.parent.name, C_SHIM.name}, f"{folder}/{name}"


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Groups of more than one node in which each can be reached from each."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = edges.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    far = {node: reached(node) for node in edges}
    groups = {frozenset(other for other in far[node] if node in far.get(other, ())) for node in far}
    return [set(group) for group in groups if len(group) > 1]


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}]


def test_files_lie_in_no_circle() -> None:
    """A header and its C file are one."""
    edges: dict[str, set[str]] = {}
    for path in SOURCES:
        edges.setdefault(path.stem, set()).update({Path(each).stem for each in includes(path)} - {path.stem})
    found = circles(edges)
    print("files in circles:", sum(map(len, found)), found)
    assert sum(map(len, found)) <= FILES_IN_CIRCLES


def test_no_arrow_goes_up() -> None:
    arrows = [
        f"{path.parent.name}/{path.name} -> {FOLDER[each]}/{each}"
        for path in SOURCES
        for each in includes(path)
        if HOUSE.index(FOLDER[each]) > HOUSE.index(path.parent.name)
    ]
    print("arrows up:", len(arrows), arrows)
    assert len(arrows) <= ARROWS_UP


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES


def test_a_symbol_that_a_floor_may_not_use_is_named() -> None:
    def floor(uses: str, defines: str, needs: str) -> Floor:
        return Floor(*(frozenset(each.split()) for each in (uses, defines, needs)))

    floors = {
        "base": floor("", "list pass", "malloc"),
        "order": floor("base", "count", "list free"),
        "engine": floor("base order", "run", "count list"),
    }
    assert strays(floors) == []
    upward = {**floors, "base": floor("", "list pass", "malloc run")}
    assert strays(upward) == ["base calls run, which is engine's"]
    aside = {**floors, "disk": floor("base", "submit", "count pass")}
    assert strays(aside) == ["disk calls count, which is order's"]
