# SPDX-License-Identifier: Apache-2.0
"""What the words of the command line may be: sizes, durations, speeds, paths. A wrong one is refused with the
sentence of the ConfigError that it raises."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from vhostsync import quantities
from vhostsync.errors import ConfigError
from vhostsync.lineage_name import check_lineage_name
from vhostsync.mirror_target import check_speed
from vhostsync.printable import printable
from vhostsync.storage.kinds import absolute_name


class Parser(argparse.ArgumentParser):
    """No abbreviated options: a script that uses one would break when another option is added."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        """One sentence, which the whole usage would hide."""
        self.exit(2, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's own is silent about output that cannot be written."""
        if file is sys.stdout:
            sys.stdout.write(message)
        else:
            super()._print_message(message, file)


def checked(parse: Callable[[str], Any], name: str) -> Callable[[str], Any]:
    """`parse` as argparse calls it, with its sentence as the error."""

    def converted(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    converted.__name__ = name  # argparse shows it
    return converted


def _positive_seconds(text: str) -> float:
    seconds = float(quantities.parse_seconds(text))
    if seconds <= 0:
        raise ConfigError("It must be longer than nothing.")
    return seconds


def _speed(text: str) -> int:
    return 0 if text == "none" else check_speed(quantities.parse_bytes(text.removesuffix("/s")))


def _positive_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and int(text)):
        raise ConfigError(f"{text!r} is no whole number from 1 to 9999")
    return int(text)


def _disk_place(text: str) -> str:
    """A directory, or what names of disks of another kind begin with."""
    if text.startswith("rbd:"):
        return text.rstrip("/")
    return _disk_name(text)


def _disk_name(text: str) -> str:
    if not text:
        raise ConfigError("it is empty, and should name a file or a device")
    name = absolute_name(text, "The disk")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"The path {text!r} is not UTF-8; the control socket cannot carry it.") from error
    return name


size = checked(quantities.parse_bytes, "size")
positive_seconds = checked(_positive_seconds, "duration")
speed = checked(_speed, "speed")
disk_name = checked(_disk_name, "path")
disk_place = checked(_disk_place, "place")
positive_number = checked(_positive_number, "number")
lineage_name = checked(check_lineage_name, "name")
