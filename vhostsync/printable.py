# SPDX-License-Identifier: Apache-2.0
"""Text of others on a terminal: the name of a process, a path, what a file holds. A character that a terminal
obeys, or that hides or turns round its neighbours, would speak to the operator in this program's name. And
how sizes are said to people."""

from typing import Final

_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def printable(text: str) -> str:
    """In one line, with an escape in the place of each character that is not printable. A path that is no
    UTF-8 (surrogates, as os.fsdecode makes them) can be written to any stream then."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else _escape(ord(each)) for each in text)


def printable_lines(text: str) -> str:
    """The same for text of our own that has lines."""
    return "\n".join(map(printable, text.split("\n")))


def _escape(number: int) -> str:
    if 0xDC80 <= number <= 0xDCFF:  # a byte that was no UTF-8
        number -= 0xDC00
    if number <= 0xFF:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"


def size(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in _UNITS:
        count /= 1024
        if count < 1023.95 or unit == _UNITS[-1]:
            return f"{count:.1f} {unit}"
    raise AssertionError
