# SPDX-License-Identifier: Apache-2.0
"""Writes the manual, a page a command, from the commands and options as the program has them:
`python docs/manual_pages.py DIRECTORY`. Needs nothing but Python."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from vhostsync import __version__
from vhostsync.cli.arguments import make_parser
from vhostsync.config import ServeConfig
from vhostsync.option import Option, options_of
from vhostsync.receive.receive_config import ReceiveConfig

DECLARED: Final = [option for config in (ServeConfig, ReceiveConfig) for _, option in options_of(config)]


def commands(
    parser: argparse.ArgumentParser, summary: str = ""
) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Each command, those above others included: its words, what it does in a clause, its parser."""
    yield parser.prog, summary or "keep a running guest's disk in step with a second one", parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {each.dest: each.help or "" for each in action._choices_actions}
            for name, command in action.choices.items():
                yield from commands(command, summaries.get(name, ""))


def escaped(text: str) -> str:
    """As troff has it: dashes that can be copied, and no line that is taken for a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def as_it_stands(text: str) -> str:
    return f".nf\n{escaped(text)}\n.fi"


def page_name(prog: str) -> str:
    return prog.replace(" ", "-")


def options(group: argparse._ArgumentGroup) -> Iterator[str]:
    for action in group._group_actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action._choices_actions:
                yield f".TP\n.B {escaped(each.dest)}\n{escaped(each.help or '')}"
            continue
        names = [rf"\fB{escaped(name)}\fR" for name in action.option_strings]
        value = action.metavar if isinstance(action.metavar, str) else action.dest
        if action.nargs == 0:
            head = ", ".join(names)
        else:
            head = f"{', '.join(names)} \\fI{escaped(value)}\\fR".strip()
        yield f".TP\n{head}\n{escaped(explained(action))}"


def explained(action: argparse.Action) -> str:
    text = " ".join((action.help or "").split()).replace("%%", "%")
    for option in DECLARED:
        if option.flag in action.option_strings and text.startswith(option.help):
            return f"{text}{bounds(option)}.{' ' + option.detail if option.detail else ''}"
    return f"{text}."


def bounds(option: Option) -> str:
    if option.least is None or option.most is None:
        return ""
    return f"; {option.kind.text(option.least)} to {option.kind.text(option.most)}"


def page(prog: str, summary: str, parser: argparse.ArgumentParser, others: list[str], day: str) -> str:
    usage = parser.format_usage().removeprefix("usage: ").strip("\n")
    usage = re.sub(r"^ {7}", "", usage, flags=re.MULTILINE)
    parts = [
        f'.TH "{page_name(prog).upper()}" 1 "{day}" "vhostsync {__version__}" "vhostsync"',
        f".SH NAME\n{escaped(page_name(prog))} \\- {escaped(' '.join(summary.split()))}",
        f".SH SYNOPSIS\n{as_it_stands(usage)}",
        f".SH DESCRIPTION\n{escaped(' '.join((parser.description or summary).split()))}",
    ]
    for group in parser._action_groups:
        if group._group_actions:
            parts.append(f'.SH "{escaped((group.title or "options").upper())}"')
            parts += options(group)
    if parser.epilog:
        parts.append(f".SH NOTES\n{as_it_stands(parser.epilog.strip())}")
    see = ",\n".join(f".BR {escaped(page_name(other))} (1)" for other in others if other != prog)
    parts.append(f".SH SEE ALSO\n{see.replace('(1),', '(1) ,')}")
    return "\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """By file name."""
    now = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    day = time.strftime("%Y-%m-%d", time.gmtime(now))
    all_commands = list(commands(make_parser()))
    names = [prog for prog, _, _ in all_commands]
    return {
        f"{page_name(prog)}.1": page(prog, summary, parser, names, day)
        for prog, summary, parser in all_commands
    }


def main(directory: str) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    os.environ["COLUMNS"] = "80"  # what argparse fills its lines by
    for name, text in pages().items():
        (Path(directory) / name).write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: manual_pages.py DIRECTORY")
    main(sys.argv[1])
