# SPDX-License-Identifier: Apache-2.0
"""What `exporter` is told, checked once, and frozen: as ServeConfig (config.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vhostsync.option import FLAG, SECONDS, Kind, check_options, option
from vhostsync.option_values import (
    LogFormat,
    LogLevel,
    TcpAddress,
    absolute,
    check_socket_paths,
    log_format_option,
    log_level_option,
    parse_metrics,
)

BACKENDS: Final = "the backends"
PAGE: Final = "the page"
OPERATION: Final = "operation"

LISTEN: Final = TcpAddress("127.0.0.1", 9748)


@dataclass(frozen=True, kw_only=True)
class ExporterConfig:
    """Everything that `exporter` is told. Raises ConfigError."""

    directories: tuple[Path, ...] = option(
        "--sockets", BACKENDS, Kind("DIR", Path),
        "only those whose control sockets lie there: DIR/NAME/control, DIR/NAME.control", (),
        repeatable=True, default_text="all disks of this host, as `vhostsync list` has them, and receivers",
        detail="NAME is the label `vm` of its metrics (of `NAME.sock.control`, too). They are looked for "
        "anew at each scrape.",
    )  # fmt: skip
    deadline_s: float = option(
        "--deadline", BACKENDS, SECONDS,
        "how long each backend may take to answer; after that it is shown as down", 2.0, least=0.05, most=60,
        detail="All are asked at once. One that did not answer is waited for by no later scrape until it "
        "does.",
    )  # fmt: skip

    listen: Path | TcpAddress = option(
        "--listen", PAGE, Kind("PLACE", lambda text: parse_metrics(text), str),
        "serve the page at /metrics on ADDRESS:PORT, or on this unix socket", LISTEN,
        detail="On an address that is not a loopback one, everybody who reaches it can read: who has which "
        "disk, and how busy it is. There is no encryption; a proxy in front can have both.",
    )  # fmt: skip
    once: bool = option("--once", PAGE, FLAG, "print the page and end", False)

    log_format: LogFormat = log_format_option(OPERATION)
    log_level: LogLevel = log_level_option(OPERATION)

    def __post_init__(self) -> None:
        directories = tuple(absolute(each, "--sockets") for each in self.directories)
        object.__setattr__(self, "directories", directories)
        check_options(self)
        check_socket_paths([("--listen", self.listen if isinstance(self.listen, Path) else None)])
