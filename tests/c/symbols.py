# SPDX-License-Identifier: Apache-2.0
"""No floor of c_shim/ calls a function of a floor that it may not use: the include path cannot see a
prototype that was written by hand, the symbols of the libraries can.

    symbols.py NM NAME=USED,USED=LIBRARY ...

Run by the build (tests/c/meson.build) with the table of c_shim/meson.build. Exit code 1 names what is wrong.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass


@dataclass(frozen=True)
class Floor:
    uses: frozenset[str]
    """Names of floors."""
    defines: frozenset[str]
    needs: frozenset[str]
    """Symbols that it does not define itself."""


def strays(floors: Mapping[str, Floor]) -> list[str]:
    """A line for each symbol that a floor takes from another than those that it may use."""
    return [
        f"{name} calls {symbol}, which is {other}'s"
        for name, floor in floors.items()
        for other, owner in floors.items()
        if other != name and other not in floor.uses
        for symbol in sorted(floor.needs & owner.defines)
    ]


def _symbols(nm: str, library: str, *options: str) -> Set[str]:
    command = [nm, "--extern-only", "--format=posix", *options, library]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # A line is NAME TYPE VALUE SIZE; the name of an object is a line of its own.
    return {words[0] for line in said.splitlines() if len(words := line.split()) > 1}


def read_floor(nm: str, uses: str, library: str) -> Floor:
    defines = _symbols(nm, library, "--defined-only")
    needs = _symbols(nm, library, "--undefined-only") - defines
    return Floor(frozenset(filter(None, uses.split(","))), frozenset(defines), frozenset(needs))


def main(nm: str, *arguments: str) -> int:
    table = [argument.split("=", 2) for argument in arguments]
    wrong = strays({name: read_floor(nm, uses, library) for name, uses, library in table})
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
