# SPDX-License-Identifier: Apache-2.0
"""The house of vhostsync/: which folder may import which, and that no modules go round in a circle. An import
for types alone counts like any other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhostsync

HOUSE = Path(vhostsync.__file__).parent

MAY_IMPORT: dict[str, set[str]] = {
    # The binding to c_shim/, and the hash that says whether it is of these sources.
    "binding": set(),
    # What a person reads, and how it is written: errors, events, limits, quantities, options, statistics.
    "words": set(),
    # The operating system: the kernel, signals, the service manager, files and sockets of our own.
    "host": {"words"},
    # Disks, a module a kind: how they are opened, recognised and judged.
    "storage": {"binding", "words", "host"},
    # The configuration, and the log that it shapes.
    "config": {"words", "storage"},
    # What this process may still do.
    "confine": {"words", "host", "storage", "config"},
    # Which disk is the truth, and where the peer may differ.
    "record": {"words", "host", "storage", "config"},
    # The protocol that frontends speak.
    "vhost_user": {"words", "host", "record"},
    # The data plane as Python sees it.
    "engine": {"binding", "words", "host", "storage", "record", "vhost_user"},
    # The policy: what is allowed when, and what is recorded before what.
    "mirror": {"words", "host", "storage", "config", "confine", "record", "vhost_user", "engine"},
    # The control socket. It knows of the mirror only what it asks of it.
    "control": {"words", "host", "config"},
    "metrics": {"words", "config", "record", "engine", "mirror", "control"},
    # One disk with all that belongs to it.
    "device": {"words", "storage", "config", "confine", "record", "vhost_user", "engine", "mirror"},
    # The process of `serve`, around its device.
    "daemon": {
        "words", "host", "storage", "config", "confine", "record", "vhost_user", "engine", "control",
        "metrics", "device",
    },
    # The process of `receive`: a disk of this host, for an owner on another one.
    "receive": {"words", "host", "storage", "config", "confine", "record", "control"},
    # The process of `node`, from which backends are forked.
    "node": {"words", "host", "config", "daemon"},
    # All disks of this host: which there are, and what is done with many. Of what runs it asks by the control
    # sockets alone; who holds a record's lock, the operating system.
    "fleet": {"words", "host", "storage", "record", "control"},
    # The process of `exporter`: all backends of the host, seen by their control sockets.
    "exporter": {"words", "host", "config", "control", "metrics", "fleet"},
    # The command line: of what runs it asks by the control socket alone.
    "cli": {
        "words", "storage", "config", "record", "control", "device", "daemon", "receive", "node",
        "exporter", "fleet",
    },
}
"""From the lowest floor up: each names only such as stand above it here."""

AT_THE_TOP = {
    "__init__": "words", "errors": "words", "events": "words", "limit_options": "config", "limits": "words",
    "group_options": "config",
    "log_writer": "words", "lineage_name": "words", "metrics_page": "words", "option": "words",
    "printable": "words", "receive_metrics": "words",
    "quantities": "words", "statistic": "words", "typed_fields": "words", "config": "config", "log": "config",
    "mirror_target": "config", "option_values": "config",
    "metrics": "metrics", "daemon": "daemon", "hand_over": "daemon",
    "group_members": "daemon", "__main__": "cli",
    "_shim": "binding",
    "_source_hash": "binding",
}  # fmt: skip


def modules() -> dict[str, Path]:
    """By dotted name; the binding, too, of which there are only the types to see."""
    found = {}
    for path in sorted([*HOUSE.rglob("*.py"), HOUSE / "_shim.pyi"]):
        parts = ["vhostsync", *path.relative_to(HOUSE).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the house that this one imports, anywhere in its text."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for each in node.names:
                inner = f"{module}.{each.name}"
                if inner in known:
                    yield inner
                elif module in known:
                    yield module


def folder_of(name: str) -> str:
    parts = name.split(".")[1:] or ["__init__"]
    if len(parts) > 1 or (HOUSE / parts[0]).is_dir():
        return parts[0]
    return AT_THE_TOP[parts[0]]


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imports(name, path, known)) - {name} for name, path in known.items()}


def test_every_module_imports_only_what_its_folder_may(arrows: dict[str, set[str]]) -> None:
    wrong = [
        f"{name} ({folder_of(name)}) imports {other} ({folder_of(other)})"
        for name, others in arrows.items()
        for other in sorted(others)
        if folder_of(other) not in {folder_of(name), *MAY_IMPORT[folder_of(name)]}
    ]
    assert not wrong, "\n".join(wrong)


def test_of_the_disks_only_those_at_a_path_know_the_binding(arrows: dict[str, set[str]]) -> None:
    """Any other kind comes with a library of its own. All else is the engine's."""
    using = {name for name, others in arrows.items() if "vhostsync._shim" in others}
    outside = {name for name in using if folder_of(name) != "engine"}
    assert outside == {"vhostsync.storage.native"}


def test_the_folders_stand_on_each_other() -> None:
    floors = list(MAY_IMPORT)
    for at, (name, may) in enumerate(MAY_IMPORT.items()):
        assert may <= set(floors[:at]), f"{name} may import what stands above it"


def test_no_permission_is_left_over(arrows: dict[str, set[str]]) -> None:
    taken = {(folder_of(name), folder_of(other)) for name, others in arrows.items() for other in others}
    idle = [
        f"{name} may import {other}, and does not"
        for name, may in MAY_IMPORT.items()
        for other in may
        if (name, other) not in taken
    ]
    assert not idle, "\n".join(sorted(idle))


def test_no_modules_go_round_in_a_circle(arrows: dict[str, set[str]]) -> None:
    left = {name: set(others) for name, others in arrows.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in a circle, or above one: {sorted(left)}"


def test_an_import_for_types_alone_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..errors import DiskError\n"
        "def f() -> None:\n    from vhostsync import events\n"
    )
    known = {"vhostsync.errors": path, "vhostsync.events": path}
    assert list(imports("vhostsync.mirror.x", path, known)) == ["vhostsync.errors", "vhostsync.events"]
