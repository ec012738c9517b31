# SPDX-License-Identifier: Apache-2.0
"""How much the guest may do: bytes and requests a second, of reads, of writes, and of both.

Names and meaning are those of QEMU's block_set_io_throttle; c_shim/order/rate_limit.h says how they are
kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .errors import ConfigError
from .quantities import bytes_text, parse_bytes, parse_seconds

KINDS: Final = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
"""enum vs_limited, in its order."""

RATE_MAX: Final = 10**15
"""Of rate_limit.h; also for what a burst brings as a whole."""


@dataclass(frozen=True)
class Rate:
    """A limit. Raises ConfigError, whose sentence goes on after a name."""

    per_s: int = 0  # 0: there is none
    burst: int = 0  # a second; 0: none
    length_s: int = 1  # how long it may last

    def __post_init__(self) -> None:
        if not 0 <= self.per_s <= RATE_MAX:
            raise ConfigError(f"a limit is at most {RATE_MAX:,} a second, 0 for none")
        if self.burst == 0:
            if self.length_s != 1:
                raise ConfigError("the length of a burst is given with the burst")
            return
        if self.per_s == 0:
            raise ConfigError("a burst is given with the limit that it exceeds")
        if self.burst < self.per_s:
            raise ConfigError("a burst is no slower than its limit")
        if self.length_s < 1:
            raise ConfigError("a burst lasts for at least a second")
        if self.burst * self.length_s > RATE_MAX:
            raise ConfigError(f"a burst brings at most {RATE_MAX:,} in all")


NO_LIMIT: Final = Rate()


@dataclass(frozen=True)
class Limits:
    """All of a device. An operation larger than `iops_size` counts as so many of that size (0: as one)."""

    bps: Rate = NO_LIMIT
    bps_rd: Rate = NO_LIMIT
    bps_wr: Rate = NO_LIMIT
    iops: Rate = NO_LIMIT
    iops_rd: Rate = NO_LIMIT
    iops_wr: Rate = NO_LIMIT
    iops_size: int = 0

    def rates(self) -> dict[str, Rate]:
        """By their names, in the order of KINDS."""
        return {kind: getattr(self, kind) for kind in KINDS}

    def words(self) -> dict[str, str]:
        """Those that there are, for people."""
        texts = {
            kind: (bytes_rate_text if kind.startswith("bps") else requests_rate_text)(rate)
            for kind, rate in self.rates().items()
            if rate.per_s
        }
        return texts | ({"iops_size": bytes_text(self.iops_size)} if self.iops_size else {})

    def changed(self, given: Mapping[str, int | None]) -> "Limits":
        """By the arguments of block_set_io_throttle. A limit that is named is given whole, with its burst,
        and `iops_size` goes with the limits of requests; what is not named (None) stays. ConfigError."""
        new: dict[str, Any] = self.rates()
        for kind in KINDS:
            per_s, burst, length_s = (given.get(kind + end) for end in ("", "_max", "_max_length"))
            if per_s is not None:
                new[kind] = _named(kind, per_s, burst or 0, 1 if length_s is None else length_s)
            elif burst is not None or length_s is not None:
                raise ConfigError(f"{kind} is missing; its burst and the length of that are given with it.")
        size = given.get("iops_size")
        if size is None:
            counts_anew = any(given.get(kind) is not None for kind in KINDS if kind.startswith("iops"))
            size = 0 if counts_anew else self.iops_size
        return Limits(**new, iops_size=size)

    def shown(self) -> dict[str, int]:
        """As the arguments that would set them."""
        shown: dict[str, int] = {}
        for kind, rate in self.rates().items():
            shown |= {kind: rate.per_s, f"{kind}_max": rate.burst, f"{kind}_max_length": rate.length_s}
        return shown | {"iops_size": self.iops_size}


def _named(kind: str, per_s: int, burst: int, length_s: int) -> Rate:
    try:
        return Rate(per_s, burst, length_s)
    except ConfigError as error:
        raise ConfigError(f"{kind}: {error}.") from error


NO_LIMITS: Final = Limits()


# ---- as words: RATE[:BURST[:TIME]] ----------------------------------------------


def parse_bytes_rate(text: str) -> Rate:
    """From "100M", "100M:400M", "100M:400M:10s", "none". ConfigError."""
    return _parse_rate(text, parse_bytes)


def parse_requests_rate(text: str) -> Rate:
    """From "500", "500:2000", "500:2000:10s", "none". ConfigError."""
    return _parse_rate(text, _whole_number)


def bytes_rate_text(rate: Rate) -> str:
    return _rate_text(rate, bytes_text)


def requests_rate_text(rate: Rate) -> str:
    return _rate_text(rate, str)


def _whole_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 16):
        raise ConfigError(f"{text!r} is no number of requests")
    return int(text)


def _parse_rate(text: str, amount: Callable[[str], int]) -> Rate:
    if text == "none":
        return NO_LIMIT
    words = text.split(":")
    if len(words) > 3:
        raise ConfigError(f"{text!r} is no limit; write RATE, RATE:BURST, or RATE:BURST:TIME")
    numbers = [amount(word.removesuffix("/s")) for word in words[:2]]
    length_s = parse_seconds(words[2]) if len(words) == 3 else 1.0
    if length_s != int(length_s):
        raise ConfigError(f"{words[2]!r}: a burst lasts for whole seconds")
    return Rate(numbers[0], numbers[1] if len(numbers) > 1 else 0, int(length_s))


def _rate_text(rate: Rate, amount: Callable[[int], str]) -> str:
    if rate.per_s == 0:
        return "none"
    text = amount(rate.per_s)
    if rate.burst:
        text += f":{amount(rate.burst)}"
    return text + (f":{rate.length_s}s" if rate.length_s != 1 else "")
