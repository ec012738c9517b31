# SPDX-License-Identifier: Apache-2.0
"""Writes what a shell completes a command line by, from the commands and options as the program has them:
`python docs/completions.py bash|zsh|fish`. Needs shtab."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))

import shtab

from docs.manual_pages import commands
from vhostsync.cli.arguments import make_parser

SHELLS: Final = ("bash", "zsh", "fish")
FILES: Final = ("PATH", "DESTINATION", "PLACE")
DIRECTORIES: Final = ("DIR",)


def completion(shell: str) -> str:
    parser = make_parser()
    for _, _, command in commands(parser):
        for action in command._actions:
            _tell(action)
    return str(shtab.complete(parser, shell=shell))


def _tell(action: argparse.Action) -> None:
    """What its value may be, as its metavar says."""
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if metavar in FILES:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif metavar in DIRECTORIES:
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    elif "|" in metavar:
        action.choices = [word for word in metavar.split("|") if word.islower()]


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in SHELLS:
        sys.exit(f"usage: completions.py {'|'.join(SHELLS)}")
    sys.stdout.write(completion(sys.argv[1]))
