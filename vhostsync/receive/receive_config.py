# SPDX-License-Identifier: Apache-2.0
"""What `receive` is told, checked once, and frozen: as ServeConfig (config.py)."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vhostsync.errors import ConfigError
from vhostsync.option import FLAG, NUMBER, PATH, Kind, check_options, one_of, option, options_of
from vhostsync.option_values import (
    LogFormat,
    LogLevel,
    Sandbox,
    TcpAddress,
    check_socket_paths,
    log_format_option,
    log_level_option,
    parse_metrics,
)
from vhostsync.storage.disk import absolute_path

OWNER: Final = "the owner (of another host)"
DISK: Final = "the disk"
OPERATION: Final = "operation"
PRIVILEGES: Final = "privileges"

PORT_MAX: Final = 65535
_ADDRESS: Final = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<host>[^\[\]:/\s]+)):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True)
class Address:
    """A host, by name or address, and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """As 0.0.0.0:7070, [::]:7070, host-b:7070. ConfigError."""
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found["port"]) > PORT_MAX:
        raise ConfigError(f"{text!r} is no HOST:PORT; write [ADDRESS]:PORT for IPv6, 0.0.0.0:PORT for all.")
    return Address(found["six"] or found["host"], int(found["port"]))


@dataclass(frozen=True, kw_only=True)
class ReceiveConfig:
    """Everything that `receive` is told. Raises ConfigError."""

    listen: Address = option(
        "--listen", OWNER, Kind("HOST:PORT", parse_address), "where the owner asks for the disk",
        required=True,
    )
    data_port: int | None = option(
        "--data-port", OWNER, NUMBER, "the port of the data, on the same address; 0: any that is free",
        least=0, most=PORT_MAX, default_text="the one after that of --listen",
    )
    tls_certificates: Path = option(
        "--tls-certificates", OWNER, Kind("DIR", Path), "ca-cert.pem, server-cert.pem and server-key.pem",
        required=True,
        detail="Whoever has a certificate of that CA may ask to be the owner. They are read again when they "
        "have changed.",
    )

    blk_file: Path = option("--blk-file", DISK, PATH, "image file or block device", required=True)
    create: bool = option(
        "--create", DISK, FLAG, "where there is no image file, make it when an owner asks for that", False,
        detail="With `mirror start receive://… --create`, at the size of the owner's disk.",
    )
    state_file: Path | None = option(
        "--state-file", DISK, PATH, "where it is kept whose disk this is",
        default_text="the disk's path and .receive; of a block device in the state directory",
    )

    control_path: Path | None = option(
        "--control", OPERATION, PATH, "make the control socket here, for the operator of this host"
    )
    metrics: Path | TcpAddress | None = option(
        "--metrics", OPERATION, Kind("PLACE", lambda text: parse_metrics(text)),
        "serve Prometheus metrics on this unix socket, or on ADDRESS:PORT",
    )
    log_format: LogFormat = log_format_option(OPERATION)
    log_level: LogLevel = log_level_option(OPERATION)

    user: str | None = option(
        "--user", PRIVILEGES, Kind("NAME[:GROUP]"),
        "become this user first; the disk and the certificates must be within its reach",
        default_text="the user that starts it",
    )
    sandbox: Sandbox = option(
        "--sandbox", PRIVILEGES, one_of("auto", "off", "require"),
        "drop rights that are not needed: as many as the kernel can (auto), none, or all or fail", "auto",
        detail="It has to start qemu-nbd, so running programs stays allowed; the kernel withholds all files "
        "but the disk's, the state's and the system's.",
    )

    allow_paths: tuple[Path, ...] = ()  # all that is written to is known

    def __post_init__(self) -> None:
        for each, declared in options_of(self):
            value = getattr(self, each.name)
            if isinstance(value, Path):
                object.__setattr__(self, each.name, Path(absolute_path(str(value), declared.flag)))
        check_options(self)
        check_socket_paths(
            (
                ("--control", self.control_path),
                ("--metrics", self.metrics if isinstance(self.metrics, Path) else None),
            )
        )
        if self.user is not None and not all(self.user.split(":", 1)):
            raise ConfigError(f"--user {self.user!r} is not NAME or NAME:GROUP.")
        if self.wanted_data_port > PORT_MAX:
            raise ConfigError(f"--listen {self.listen}: no port is left for the data; give --data-port.")
        if self.wanted_data_port == self.listen.port != 0:
            raise ConfigError(f"--data-port {self.data_port} is the port of --listen; it needs another.")

    @property
    def wanted_data_port(self) -> int:
        """0: any."""
        if self.data_port is not None:
            return self.data_port
        return self.listen.port + 1 if self.listen.port else 0
