# SPDX-License-Identifier: Apache-2.0
"""Sizes and times as words: what an operator writes, and how a value is written back."""

import re
from decimal import Decimal
from typing import Final

from .errors import ConfigError

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
BYTES_MAX: Final = 2**63 - 1  # what an off_t holds

_SIZE = re.compile(r"(\d+(?:\.\d+)?)(?:([KMGT])(?:i?B)?|B)?", re.IGNORECASE | re.ASCII)
_SIZE_UNIT: Final = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1024 * GIB}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|min|h)?", re.ASCII)
_DURATION_UNIT_S: Final = {
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "m": Decimal(60),
    "min": Decimal(60),
    "h": Decimal(3600),
}


def parse_bytes(text: str) -> int:
    """Bytes from "4096", "64M", "64MB", "64MiB", "1.5G" (all of them powers of 1024). ConfigError where it is
    none, or no whole number."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or len(text) > 40:
        raise ConfigError(
            f"{text!r} is not a size; write a number of bytes, or one with K, M, G or T such as 64M or 1GiB."
        )
    amount = Decimal(match[1]) * _SIZE_UNIT[(match[2] or "").upper()]
    if amount != amount.to_integral_value():
        raise ConfigError(f"{text!r} is not a whole number of bytes.")
    if amount > BYTES_MAX:
        raise ConfigError(f"{text!r} is more than any disk here can have.")
    return int(amount)


def parse_seconds(text: str) -> float:
    """Seconds from "10", "2.5s", "500ms", "2m", "1h". ConfigError where it is none."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or len(text) > 40:
        raise ConfigError(
            f"{text!r} is not a duration; write seconds, or a number with ms, s, m or h such as 500ms or 10s."
        )
    return float(Decimal(match[1]) * _DURATION_UNIT_S[match[2] or "s"])


def parse_poll_us(text: str) -> int | None:
    """Microseconds from "50"; None from "auto". ConfigError where it is neither."""
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ConfigError(f"{text!r} is no time for polling; write auto, 0 (never), or microseconds.")
    return int(text)


def bytes_text(count: int) -> str:
    """The shortest word for it: "64M", "64K", "4097"."""
    for unit in "TGMK":
        if count and count % _SIZE_UNIT[unit] == 0:
            return f"{count // _SIZE_UNIT[unit]}{unit}"
    return str(count)


def seconds_text(seconds: float) -> str:
    """The shortest word for it: "1h", "10s", "500ms"."""
    if seconds and seconds % 3600 == 0:
        return f"{seconds / 3600:g}h"
    return f"{seconds:g}s" if seconds >= 1 else f"{seconds * 1000:g}ms"
