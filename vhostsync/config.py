# SPDX-License-Identifier: Apache-2.0
"""What `serve` is told, checked once, and frozen.

Every value is checked here and nowhere else: whoever holds a `ServeConfig` or a `MirrorTarget` may rely on
it. What a value *names* (a disk, a directory) is looked at by whoever opens it. All checks raise
ConfigError with a sentence that names the option, so that it can be shown as it is."""

import ipaddress
import os
import re
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal, get_args

from .errors import ConfigError

Cache = Literal["none", "writeback"]
DiskFormat = Literal["raw"]
LogFormat = Literal["auto", "text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
OnCongestion = Literal["block", "pull-ahead"]
Sandbox = Literal["auto", "off", "require"]
OnSourceError = Literal["report", "switch"]
OnDestinationError = Literal["degrade", "pause"]

class Answer(StrEnum):
    """What the operator says of the disk that is given."""

    PROMOTE = "promote"  # it is the truth from here on, and the recorded current disk is lost
    SAME_DISK = "same-disk"  # it is the recorded current disk
    NEW_DISK = "new-disk"  # it is none that a record knows


KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# The limits that the engine has are in c_shim/shim_api.h (enum vs_limit); a unit test compares.
QUEUES_MAX: Final = 64
NAME_CHARACTERS_MAX: Final = 128
SERIAL_BYTES_MAX: Final = 20  # virtio 1.x 5.2.6, VIRTIO_BLK_ID_BYTES
REQUEST_BYTES_MAX: Final = 8 * MIB
BLOCK_BYTES: Final = (512, 4096)

LOG_BYTES_MIN: Final = REQUEST_BYTES_MAX  # durability.md, rule 6: at least the largest request
LOG_BYTES_MAX: Final = 64 * GIB
CONGESTION_FILL_MIN: Final = MIB
MAX_LAG_MS_MAX: Final = 60_000
TIMEOUT_S_MAX: Final = 3600.0
POLL_US_MAX: Final = 10_000
THREADS_MAX: Final = 16
COPY_DEPTH_MAX: Final = 16
DIRTY_REGION_BYTES_MIN: Final = 4 * KIB
DIRTY_REGION_BYTES_MAX: Final = 64 * MIB
DIRTY_REGIONS: Final = 1 << 25  # so many need no larger regions: 4 MiB a map
AL_EXTENTS_MIN: Final = 64
AL_EXTENTS_MAX: Final = 65536
SOCKET_PATH_BYTES_MAX: Final = 107  # sun_path of <sys/un.h>, less its final zero
SPEED_BYTES_PER_S_MAX: Final = 2**63 - 1

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
    if amount > SPEED_BYTES_PER_S_MAX:
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


@dataclass(frozen=True)
class TcpAddress:
    """A loopback address and a port (0: the kernel chooses)."""

    host: str
    port: int

    def __post_init__(self) -> None:
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError as error:
            raise ConfigError(
                f"{self.host!r} is not an IP address; metrics want 127.0.0.1, [::1] or a unix socket."
            ) from error
        if not address.is_loopback:
            raise ConfigError(
                f"{self.host} is not a loopback address; put a proxy in front to show metrics to a network."
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"{self.port} is not a TCP port.")


def parse_metrics(text: str) -> Path | TcpAddress:
    """Where metrics are served: "/run/x.sock", "unix:/run/x.sock", "127.0.0.1:9100", "[::1]:9100"."""
    if text.startswith("unix:") or "/" in text:
        return _absolute(Path(text.removeprefix("unix:")), "--metrics")
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or len(port) > 5:
        raise ConfigError(
            f"{text!r} is no place for metrics; write the path of a unix socket, or 127.0.0.1:PORT."
        )
    return TcpAddress(host.removeprefix("[").removesuffix("]"), int(port))


@dataclass(frozen=True)
class ServeConfig:
    """Everything that `serve` is told. Paths are made absolute. Raises ConfigError."""

    blk_file: Path
    socket_path: Path | None = None  # exactly one of socket_path and fd
    fd: int | None = None  # a listening or connected unix socket that was inherited
    read_only: bool = False
    disk_format: DiskFormat | None = None  # None: as it seems; a disk that a record knows is raw
    cache: Cache = "none"  # none: direct I/O; writeback: through the page cache
    destination_cache: Cache = "none"  # for a mirror-start that names none
    num_queues: int = 4
    serial: str = ""
    block_bytes: int | None = None  # None: as the disk has it
    write_cache: bool = True  # the default of virtio's WCE; False is write-through
    state_file: Path | None = None  # None: state_index.py finds or names it
    no_state_file: bool = False
    answer: Answer | None = None  # of the operator, to what the state record has asked
    bitmap: Path | None = None  # where the differences outlive the process
    al_extents: int = 1024
    al_extent_bytes: int = 4 * MIB
    control_path: Path | None = None  # None: "<socket_path>.control"
    log_bytes: int = 64 * MIB
    max_lag_ms: int = 500
    on_congestion: OnCongestion = "block"
    congestion_fill_bytes: int | None = None  # None: 7/8 of the log
    destination_timeout_s: float = 10.0
    stop_timeout_s: float = 1.0
    resume_mirror: bool = True  # begin the mirror again that the last run had
    on_destination_error: OnDestinationError = "degrade"  # go on without it; or flushes wait for the next one
    destination_retry_s: float | None = None  # the first pause before one that failed is tried; None: never
    copy_depth: int = 8  # region copies of 1 MiB in flight
    dirty_region_bytes: int | None = None  # None: 64 KiB, more for disks above 2 TiB
    metrics: Path | TcpAddress | None = None
    name: str = ""  # of the machine, for metrics; where it is empty see `label`
    poll_us: int | None = None  # look for work so long before sleeping; None: where it pays
    threads: int = 1  # one keeps the rings, the order and the log; the others do a share of the disks' work
    log_format: LogFormat = "auto"
    log_level: LogLevel = "info"
    user: str | None = None  # NAME[:GROUP] to become; None: as it was started
    sandbox: Sandbox = "auto"  # privileges.py
    allow_paths: tuple[Path, ...] = ()  # directories in which later destinations may lie
    read_fallback: bool = False  # what the source cannot read is read from a steady destination
    on_source_error: OnSourceError = "report"  # to the guest; or switch to a steady destination

    def __post_init__(self) -> None:
        for name in ("blk_file", "socket_path", "state_file", "control_path", "bitmap"):
            path = getattr(self, name)
            if path is not None:
                object.__setattr__(self, name, _absolute(path, _option(name)))
        places = tuple(_absolute(path, "--allow-path") for path in self.allow_paths)
        object.__setattr__(self, "allow_paths", places)
        self._check_places()
        self._check_device()
        self._check_mirror()
        _one_of("--log-format", self.log_format, get_args(LogFormat))
        _one_of("--log-level", self.log_level, get_args(LogLevel))
        _one_of("--sandbox", self.sandbox, get_args(Sandbox))
        if self.user is not None and not all(self.user.split(":", 1)):
            raise ConfigError(f"--user {self.user!r} is not NAME or NAME:GROUP.")
        if not self.name.isprintable() or len(self.name) > NAME_CHARACTERS_MAX:
            raise ConfigError(
                f"--name {self.name!r} must be at most {NAME_CHARACTERS_MAX} characters that can be printed."
            )

    def _check_places(self) -> None:
        if (self.socket_path is None) == (self.fd is None):
            raise ConfigError("Give exactly one of --socket-path and --fd.")
        if self.fd is not None and self.fd < 0:
            raise ConfigError(f"--fd {self.fd} is not a file descriptor.")
        if self.no_state_file and self.state_file is not None:
            raise ConfigError("Give --state-file or --no-state-file, not both.")
        if self.answer is not None and (self.no_state_file or self.read_only):
            raise ConfigError(
                f"--{self.answer} is written to the state record; leave out --no-state-file and --read-only."
            )
        if self.no_state_file and self.bitmap is not None:
            raise ConfigError(
                "--bitmap needs the state record, which tells whether the bitmap may be believed; leave out "
                "--no-state-file."
            )
        sockets = [("--socket-path", self.socket_path), ("--control", self.control_socket)]
        if isinstance(self.metrics, Path):
            sockets.append(("--metrics", self.metrics))
        for option, path in sockets:
            if path is not None and len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
                raise ConfigError(
                    f"{option}: {path} is longer than the {SOCKET_PATH_BYTES_MAX} bytes of a socket path."
                )
        files = [("--blk-file", self.blk_file), ("--bitmap", self.bitmap), ("--state-file", self.state_file)]
        if self.state_file is not None:  # state_file.py makes these beside it
            for end in (".lock", ".new"):
                files.append((f"the file {end} of --state-file", Path(f"{self.state_file}{end}")))
        seen: dict[Path, str] = {}
        for option, path in sockets + files:
            if path is None:
                continue
            if path in seen:
                raise ConfigError(
                    f"{option} and {seen[path]} both name {path}; each needs a path of its own."
                )
            seen[path] = option

    def _check_device(self) -> None:
        _one_of("--cache", self.cache, get_args(Cache))
        if self.disk_format is not None:
            _one_of("--format", self.disk_format, get_args(DiskFormat))
        _one_of("--destination-cache", self.destination_cache, get_args(Cache))
        _within("--num-queues", self.num_queues, 1, QUEUES_MAX)
        if self.block_bytes is not None:
            _one_of("--block-size", self.block_bytes, BLOCK_BYTES)
        if not self.serial.isascii() or (self.serial and not self.serial.isprintable()):
            raise ConfigError(f"--serial {self.serial!r} has characters that are not printable ASCII.")
        if len(self.serial) > SERIAL_BYTES_MAX:
            raise ConfigError(f"--serial {self.serial!r} is longer than {SERIAL_BYTES_MAX} characters.")

    def _check_mirror(self) -> None:
        _within("--log-size", self.log_bytes, LOG_BYTES_MIN, LOG_BYTES_MAX)
        _within("--max-lag-ms", self.max_lag_ms, 1, MAX_LAG_MS_MAX)
        _one_of("--on-congestion", self.on_congestion, get_args(OnCongestion))
        if self.congestion_fill_bytes is not None:
            _within("--congestion-fill", self.congestion_fill_bytes, CONGESTION_FILL_MIN, self.log_bytes)
            if self.on_congestion == "block":
                raise ConfigError("--congestion-fill needs --on-congestion pull-ahead.")
        _one_of("--on-source-error", self.on_source_error, get_args(OnSourceError))
        _one_of("--on-destination-error", self.on_destination_error, get_args(OnDestinationError))
        for option, seconds in (
            ("--destination-timeout", self.destination_timeout_s),
            ("--stop-timeout", self.stop_timeout_s),
        ):
            _within(option, seconds, 0.001, TIMEOUT_S_MAX, " seconds")
        if self.destination_retry_s is not None:
            _within("--destination-retry", self.destination_retry_s, 0.001, TIMEOUT_S_MAX, " seconds")
        _within("--copy-depth", self.copy_depth, 1, COPY_DEPTH_MAX)
        if self.poll_us is not None:
            _within("--poll-us", self.poll_us, 0, POLL_US_MAX)
        _within("--threads", self.threads, 1, THREADS_MAX)
        _within("--al-extents", self.al_extents, AL_EXTENTS_MIN, AL_EXTENTS_MAX)
        _within("--al-extent-size", self.al_extent_bytes, DIRTY_REGION_BYTES_MIN, GIB)
        if self.al_extent_bytes & (self.al_extent_bytes - 1):
            raise ConfigError(f"--al-extent-size {self.al_extent_bytes} is not a power of two.")
        if self.dirty_region_bytes is None:
            return
        _within(
            "--dirty-region-size", self.dirty_region_bytes, DIRTY_REGION_BYTES_MIN, DIRTY_REGION_BYTES_MAX
        )
        if self.dirty_region_bytes & (self.dirty_region_bytes - 1):
            raise ConfigError(f"--dirty-region-size {self.dirty_region_bytes} is not a power of two.")

    def region_bytes(self, capacity_bytes: int) -> int:
        """What one dirty bit stands for, on a disk of this size."""
        region = self.dirty_region_bytes or 64 * KIB
        while self.dirty_region_bytes is None and capacity_bytes // region > DIRTY_REGIONS:
            region *= 2
        return region

    @property
    def label(self) -> str:
        """What the machine is called in metrics; empty where nobody said and there is no socket's name."""
        return self.name or (self.socket_path.stem if self.socket_path is not None else "")

    @property
    def congestion_bytes(self) -> int:
        """So much of the log in use is congestion."""
        return self.congestion_fill_bytes or self.log_bytes // 8 * 7

    @property
    def control_socket(self) -> Path | None:
        """Where the control socket is made; None where nobody said and there is no vhost-user path to
        derive it from."""
        if self.control_path is not None or self.socket_path is None:
            return self.control_path
        return self.socket_path.with_name(self.socket_path.name + ".control")


@dataclass(frozen=True)
class MirrorTarget:
    """The destination of `mirror-start`. `speed_bytes_per_s` bounds the bulk copy; 0 is no bound. Raises
    ConfigError."""

    path: Path
    create: bool = False  # make the image file, at the right size; it must not exist
    cache: Cache = "none"
    speed_bytes_per_s: int = 0
    full: bool = False  # copy everything, even where less would do
    force: bool = False  # overwrite what it seems to hold

    def __post_init__(self) -> None:
        if not self.path.is_absolute():
            raise ConfigError(f"The destination {str(self.path)!r} must be an absolute path.")
        _no_zero_byte(self.path)
        _one_of("cache", self.cache, get_args(Cache))
        check_speed(self.speed_bytes_per_s)


def check_speed(bytes_per_s: int) -> int:
    """`bytes_per_s` if it is a speed limit (0: none); else ConfigError."""
    _within("speed", bytes_per_s, 0, SPEED_BYTES_PER_S_MAX, " bytes per second")
    return bytes_per_s


def _option(field: str) -> str:
    return "--control" if field == "control_path" else f"--{field.replace('_', '-')}"


def _absolute(path: Path, option: str) -> Path:
    _no_zero_byte(path)
    if path == Path():  # also what an empty word makes
        raise ConfigError(f"{option} is empty or the current directory; write a path.")
    return absolute(path)


def absolute(path: Path) -> Path:
    """ConfigError where the current directory, from which the path starts, has been removed."""
    try:
        return path.absolute()
    except OSError as error:
        raise ConfigError(
            f"{path} begins at the current directory, which cannot be told ({error.strerror}); "
            f"write the whole path."
        ) from error


def _no_zero_byte(path: Path) -> None:
    if "\0" in str(path):
        raise ConfigError(f"The path {str(path)!r} has a zero byte in it.")


def _one_of(option: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        choice = " or ".join(map(str, allowed))
        raise ConfigError(f"{option} {value} is not known here; write {choice}.")


def _within(option: str, value: float, least: float, most: float, unit: str = "") -> None:
    if not least <= value <= most:  # also refuses a NaN
        raise ConfigError(
            f"{option} {value:,}{unit} is out of range; it is from {least:,} to {most:,}{unit}."
        )
