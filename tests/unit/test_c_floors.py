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


FLOORS_UP = ["base", "order", "disk", "virtio", "bitmap", "mirror", "guest", "engine"]
LIBRARIES = ["nbd", "rbd", "testing"]  # of their own, which come by disk/disk_services.h
HOUSE = [C_SHIM.name, *FLOORS_UP, *LIBRARIES]
"""Lowest first."""

# What is left to be untangled: these numbers only fall.
FILES_IN_CIRCLES = 0
ARROWS_UP = 0
MEMBERS_KNOWN = 14
LINES = 500


def includes(path: Path) -> Iterator[str]:
    yield from re.findall(r'^\s*#\s*include\s+"(.*?)"', path.read_text(), re.MULTILINE)


INCLUDED = {path.name: set(includes(path)) for path in SOURCES}
NAMED = {path.name: set(re.findall(r"(?:->|\.)(\w+)", path.read_text())) for path in SOURCES}
"""Members of whatever struct, by the file that names them."""


def test_a_floor_uses_lower_floors_alone() -> None:
    assert list(FLOORS) == FLOORS_UP
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


def members(body: str) -> set[str]:
    """The names that a struct's body declares at its own level."""
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL)
    body = re.sub(r"\{[^{}]*\}", "", body)
    body = re.sub(r"\(\*(\w+)\)\([^)]*\)", r"\1", body)
    found = (re.search(r"(\w+)\s*(?:\[[^\]]*\]|:\s*\d+)?\s*$", each) for each in re.split("[;,]", body))
    return {match[1] for match in found if match}


def known_elsewhere(path: Path, names: set[str]) -> set[str]:
    """Those that files of other folders name, which see this header. Another struct's member of the same name
    counts, too: the number is rather too high."""
    seen_by = {path.name}
    while more := {name for name, included in INCLUDED.items() if seen_by & included} - seen_by:
        seen_by |= more
    return names & set().union(
        *(NAMED[p.name] for p in SOURCES if p.name in seen_by and p.parent != path.parent)
    )


def test_what_is_a_member() -> None:
    assert members("int a, b[4]; /* c; */ struct { int d; } e; void (*f)(int g); unsigned h : 3;") == {
        *"abefh"
    }


def test_few_members_of_a_struct_are_known_to_more_than_one_folder() -> None:
    known = {
        name: known_elsewhere(path, members(body))
        for path in SOURCES
        if path.suffix == ".h" and path.parent != C_SHIM
        for name, body in re.findall(
            r"^struct (\w+) \{\n(.*?)^\};", path.read_text(), re.MULTILINE | re.DOTALL
        )
    }
    most = max(known, key=lambda name: len(known[name]))
    print("members that more than one folder knows:", most, len(known[most]), sorted(known[most]))
    assert len(known[most]) <= MEMBERS_KNOWN


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
