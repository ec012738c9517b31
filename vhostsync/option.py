# SPDX-License-Identifier: Apache-2.0
"""An option of `serve`, declared once: as a field of ServeConfig (config.py), with all that is to be known.

The command line (serve_arguments.py), the checks of ServeConfig, what the engine is told (`for_engine`) and
docs/options.md are made from the declarations. So a new option that the engine obeys is declared in two
places: there, and as a member of struct vs_engine_config (c_shim/shim_api.h)."""

from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from .errors import ConfigError
from .limits import bytes_rate_text, parse_bytes_rate, parse_requests_rate, requests_rate_text
from .quantities import bytes_text, parse_bytes, parse_poll_us, parse_seconds, seconds_text

_KEY: Final = "option"


@dataclass(frozen=True)
class Kind:
    """How a value is written on the command line, and how the engine counts it."""

    metavar: str = ""
    parse: Callable[[str], Any] = str  # ConfigError where the word is no such value
    text: Callable[[Any], str] = str  # the word for a value, for its default
    unit: str = ""  # in the sentence for one that is out of range
    for_engine: Callable[[Any], int] = int
    values: tuple[object, ...] = ()  # all that there are; empty: any


def _parse_number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is no whole number") from error


def _parse_on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise ConfigError(f"{text!r} is not known here; write on or off")
    return text == "on"


NUMBER: Final = Kind("N", _parse_number)
MILLISECONDS: Final = Kind("MS", _parse_number, for_engine=lambda ms: int(ms) * 1000)
SIZE: Final = Kind("SIZE", parse_bytes, bytes_text)
SECONDS: Final = Kind("TIME", parse_seconds, seconds_text, " seconds", lambda s: int(s * 1_000_000))
BYTES_RATE: Final = Kind("SIZE[:BURST[:TIME]]", parse_bytes_rate, bytes_rate_text)
REQUESTS_RATE: Final = Kind("N[:BURST[:TIME]]", parse_requests_rate, requests_rate_text)
POLLING_US: Final = Kind("auto|N", parse_poll_us)
PATH: Final = Kind("PATH", Path)
DISK_NAME: Final = Kind("PATH")  # the name of a disk: a path, or what another kind has (storage/kinds.py)
TEXT: Final = Kind("TEXT")
FLAG: Final = Kind()  # given or not
ON_OFF: Final = Kind("on|off", _parse_on_off, lambda on: "on" if on else "off")
BLOCK_SIZE: Final = Kind("SIZE", parse_bytes, values=(512, 4096))


def one_of(*words: str, engine_word: str | None = None) -> Kind:
    """One of these words. To the engine: whether it is `engine_word`."""

    def parse(text: str) -> str:
        if text not in words:
            raise ConfigError(f"{text!r} is not known here; write {' or '.join(words)}")
        return text

    return Kind("|".join(words), parse, for_engine=lambda word: int(word == engine_word), values=words)


@dataclass(frozen=True)
class Option:
    """What is declared of a field of ServeConfig. Bounds are inclusive, in the field's unit."""

    flag: str
    group: str  # its heading in --help and docs/options.md
    kind: Kind
    help: str  # one clause, for --help
    detail: str = ""  # whole sentences, for docs/options.md alone
    default_text: str | None = None  # where the default's own word says nothing
    least: float | None = None
    most: float | None = None
    engine: str | None = None  # the member of struct vs_engine_config
    required: bool = False
    repeatable: bool = False

    def default_word(self, default: object) -> str:
        """How --help and the documents show the default; empty: there is nothing to show."""
        if self.default_text is not None or self.required:
            return self.default_text or ""
        if self.kind is FLAG or default is None or default in ("", ()):
            return ""
        return self.kind.text(default)

    def wrong_value(self, value: Any) -> str | None:
        """A sentence where the value is none that the option can have."""
        if value is None:
            return None
        if self.kind.values and value not in self.kind.values:
            return f"{self.flag} {value} is not known here; write {' or '.join(map(str, self.kind.values))}."
        if self.least is not None and self.most is not None:
            return out_of_range(self.flag, value, self.least, self.most, self.kind.unit)
        return None


def out_of_range(name: str, value: float, least: float, most: float, unit: str = "") -> str | None:
    """A sentence where the value lies outside."""
    if least <= value <= most:  # also no NaN
        return None
    return f"{name} {value:,}{unit} is out of range; it is from {least:,} to {most:,}{unit}."


def option(flag: str, group: str, kind: Kind, help: str, default: Any = None, **more: Any) -> Any:  # noqa: A002
    """A field of ServeConfig that is an option. For `more` see Option."""
    declared = Option(flag, group, kind, help, **more)
    metadata = {_KEY: declared}
    return field(metadata=metadata) if declared.required else field(default=default, metadata=metadata)


def options_of(config: object) -> Iterator[tuple[Field[Any], Option]]:
    """All options of a configuration, or of its class, in the order of their declaration; what it inherits
    comes last."""
    own = vars(config if isinstance(config, type) else type(config)).get("__annotations__", {})
    found = [each for each in fields(config) if _KEY in each.metadata]  # type: ignore[arg-type]
    for each in sorted(found, key=lambda each: each.name not in own):
        yield each, each.metadata[_KEY]


def check_options(config: object) -> None:
    """Of each option by itself. ConfigError."""
    for each, declared in options_of(config):
        if wrong := declared.wrong_value(getattr(config, each.name)):
            raise ConfigError(wrong)


def for_engine(config: object) -> dict[str, int]:
    """What the options say, as members of struct vs_engine_config. What is not given is left out."""
    return {
        declared.engine: declared.kind.for_engine(getattr(config, each.name))
        for each, declared in options_of(config)
        if declared.engine is not None and getattr(config, each.name) is not None
    }
