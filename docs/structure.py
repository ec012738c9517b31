# SPDX-License-Identifier: Apache-2.0
"""Pictures of the house as the sources have it, for docs/architecture.md. What an import and an include
is, the tests say that hold the sources to their floors."""

from __future__ import annotations

from tests.unit import test_c_floors, test_layers

Arrows = set[tuple[str, str]]


def c_arrows() -> Arrows:
    folder = test_c_floors.FOLDER
    arrows = {
        (folder[using], folder[used])
        for using, others in test_c_floors.INCLUDED.items()
        for used in others
        if used in folder
    }
    return {(using, used) for using, used in arrows if using != used and "c_shim" not in (using, used)}


def python_arrows() -> Arrows:
    known = test_layers.modules()
    arrows = {
        (test_layers.folder_of(name), test_layers.folder_of(other))
        for name, path in known.items()
        for other in test_layers.imports(name, path, known)
    }
    return {(using, used) for using, used in arrows if using != used and "binding" not in (using, used)}


def picture(arrows: Arrows) -> str:
    """As Mermaid draws it; an arrow points to what is used. What a longer way stands for is left out."""
    used_by: dict[str, set[str]] = {}
    for using, used in arrows:
        used_by.setdefault(using, set()).add(used)

    def reached(start: str, seen: set[str]) -> set[str]:
        for each in used_by.get(start, set()) - seen:
            seen.add(each)
            reached(each, seen)
        return seen

    drawn = {
        (using, used)
        for using, used in arrows
        if not any(used in reached(other, set()) for other in used_by[using] - {used})
    }
    lines = [f"    {using} --> {used}" for using, used in sorted(drawn)]
    return "```mermaid\nflowchart TD\n" + "\n".join(lines) + "\n```\n"
