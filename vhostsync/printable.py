# SPDX-License-Identifier: Apache-2.0
"""Text of others on a terminal: the name of a process, a path, what a file holds. A character that a terminal
obeys, or that hides or turns round its neighbours, would speak to the operator in this program's name."""


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
