# SPDX-License-Identifier: Apache-2.0
"""What the values of options may be: words, addresses, paths. ConfigError where one is not."""

import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal

from .errors import ConfigError
from .option import one_of, option, out_of_range
from .storage.disk import absolute_path

SOCKET_PATH_BYTES_MAX: Final = 107  # sun_path of <sys/un.h>, less its final zero

Cache = Literal["none", "writeback"]
DiskFormat = Literal["raw"]
LogFormat = Literal["auto", "text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
OnCongestion = Literal["block", "pull-ahead"]
Sandbox = Literal["auto", "off", "require"]
OnSourceError = Literal["report", "switch"]
OnDestinationError = Literal["degrade", "pause"]


def log_format_option(group: str) -> Any:
    """A field of type LogFormat."""
    return option(
        "--log-format", group, one_of("auto", "text", "json"), "auto: text on a terminal, else JSON", "auto"
    )


def log_level_option(group: str) -> Any:
    """A field of type LogLevel."""
    return option(
        "--log-level", group, one_of("debug", "info", "warning", "error"), "what is logged", "info"
    )


class Answer(StrEnum):
    """What the operator says of the disk that is given."""

    PROMOTE = "promote"  # it is the truth from here on, and the recorded current disk is lost
    SAME_DISK = "same-disk"  # it is the recorded current disk
    NEW_DISK = "new-disk"  # it is none that a record knows


class TakeOver(StrEnum):
    """What a start takes over of the backend that runs."""

    NOTHING = "nothing"
    GUEST = "guest"
    GUEST_AND_LOG = "guest-and-log"  # its stderr, too


@dataclass(frozen=True)
class TcpAddress:
    """An address of this host (0.0.0.0 and [::] are all of them) and a port (0: the kernel chooses)."""

    host: str
    port: int

    def __post_init__(self) -> None:
        try:
            ipaddress.ip_address(self.host)
        except ValueError as error:
            raise ConfigError(
                f"{self.host!r} is not an IP address; metrics want 127.0.0.1, [::1], another address of this "
                "host, or a unix socket."
            ) from error
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"{self.port} is not a TCP port.")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        address = ipaddress.ip_address(self.host)
        inner = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (inner or address).is_loopback


def parse_metrics(text: str) -> Path | TcpAddress:
    """Where metrics are served: "/run/x.sock", "unix:/run/x.sock", "127.0.0.1:9100", "[::]:9100"."""
    if text.startswith("unix:") or "/" in text:
        return absolute(Path(text.removeprefix("unix:")), "--metrics")
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or len(port) > 5:
        raise ConfigError(
            f"{text!r} is no place for metrics; write the path of a unix socket, or ADDRESS:PORT."
        )
    return TcpAddress(host.removeprefix("[").removesuffix("]"), int(port))


def check_socket_paths(sockets: Iterable[tuple[str, Path | None]]) -> None:
    """Each with its option. ConfigError."""
    for flag, path in sockets:
        if path is not None and len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
            raise ConfigError(
                f"{flag}: {path} is longer than the {SOCKET_PATH_BYTES_MAX} bytes of a socket path."
            )


def absolute(path: Path, option: str) -> Path:
    return Path(absolute_path(str(path), option))


def within(name: str, value: float, least: float, most: float, unit: str = "") -> None:
    if wrong := out_of_range(name, value, least, most, unit):
        raise ConfigError(wrong)
