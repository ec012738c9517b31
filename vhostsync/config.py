# SPDX-License-Identifier: Apache-2.0
"""The configuration of `serve`: all its options, declared here, each value checked once, and frozen.

A value is checked here and nowhere else, so whoever holds a `ServeConfig` may rely on it.
What a value only *names* (a disk, a directory) is checked by whoever opens that. A check that fails raises
ConfigError, whose sentence names the option and can be shown as it stands."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from .errors import ConfigError
from .group_options import GroupOptions
from .limit_options import LimitOptions
from .lineage_name import check_lineage_name, control_of, is_lineage_name, socket_of
from .option import (
    BLOCK_SIZE,
    DISK_NAME,
    FLAG,
    MILLISECONDS,
    NUMBER,
    ON_OFF,
    PATH,
    POLLING_US,
    SECONDS,
    SIZE,
    TEXT,
    Kind,
    check_options,
    for_engine,
    one_of,
    option,
    options_of,
)
from .option_values import (
    Answer,
    Cache,
    DiskFormat,
    LogFormat,
    LogLevel,
    OnCongestion,
    OnDestinationError,
    OnSourceError,
    Sandbox,
    TcpAddress,
    absolute,
    check_socket_paths,
    log_format_option,
    log_level_option,
    parse_metrics,
    within,
)
from .quantities import GIB, KIB, MIB
from .storage.kinds import absolute_name
from .storage.network import NetworkUse

# The limits that the engine has are in c_shim/shim_api.h (enum vs_limit); a unit test compares.
QUEUES_MAX: Final = 64
NAME_CHARACTERS_MAX: Final = 128
SERIAL_BYTES_MAX: Final = 20  # virtio 1.x 5.2.6, VIRTIO_BLK_ID_BYTES
REQUEST_BYTES_MAX: Final = 8 * MIB
POLL_AUTO: Final = 1_000_000_000  # where it pays

LOG_BYTES_MIN: Final = REQUEST_BYTES_MAX  # durability.md, rule 6: at least the largest request
CONGESTION_FILL_MIN: Final = MIB
TIMEOUT_S_MIN: Final = 0.001
TIMEOUT_S_MAX: Final = 3600.0
THREADS_MAX: Final = 16
DIRTY_REGION_BYTES_MIN: Final = 4 * KIB
DIRTY_REGION_BYTES_MAX: Final = 64 * MIB
DIRTY_REGIONS: Final = 1 << 25  # so many need no larger regions: 4 MiB a map
AL_EXTENTS_MIN: Final = 64
AL_EXTENTS_MAX: Final = 65536
CONNECTIONS_MAX: Final = 16


# The headings under which options are shown.
SOCKET: Final = "the socket (exactly one)"
DISK: Final = "the disk"
MIRROR: Final = "the mirror"
NETWORK: Final = "disks over the network"
STATE_RECORD: Final = "the state record (which disk is the current one)"
OPERATION: Final = "operation"
PRIVILEGES: Final = "privileges"


@dataclass(frozen=True, kw_only=True)
class ServeConfig(LimitOptions, GroupOptions):
    """Everything that `serve` is told. Paths are made absolute. Raises ConfigError.

    Each option is declared here (option.py), or in limit_options.py, and nowhere else."""

    socket_path: Path | None = option(
        "--socket-path", SOCKET, PATH, "make the vhost-user socket here",
        default_text="with --name: vm.sock in /run/vhostsync/NAME",
    )
    fd: int | None = option("--fd", SOCKET, NUMBER, "use this inherited socket, listening or connected")

    blk_file: str | None = option(
        "--blk-file", DISK, DISK_NAME, "image file or block device",
        default_text="the current disk of --name, or of --state-file",
    )
    read_only: bool = option("--read-only", DISK, FLAG, "the guest may not write", False, engine="read_only")
    disk_format: DiskFormat | None = option(
        "--format", DISK, one_of("raw"),
        "raw: serve the disk as it is, although it looks like an image of another format",
        default_text="as it looks",
        detail="A disk that a state record knows is raw. See operations.md, \"Disks and locks\".",
    )
    cache: Cache = option(
        "--cache", DISK, one_of("none", "writeback"), "direct I/O, or through the page cache", "none",
        detail="A file system without direct I/O is used buffered, with a warning.",
    )
    num_queues: int = option(
        "--num-queues", DISK, NUMBER, "queues offered", 4, least=1, most=QUEUES_MAX, engine="queues_max"
    )
    serial: str = option("--serial", DISK, TEXT, "what the guest reads as its serial: 20 characters", "")
    block_bytes: int | None = option(
        "--block-size", DISK, BLOCK_SIZE, "512 or 4096: the guest's logical block", default_text="the disk's",
        detail="It is never smaller than the disk's. Once the disk has been mirrored, the guest keeps the "
        "size that it has had.",
    )
    write_cache: bool = option(
        "--write-cache", DISK, ON_OFF, "off: each write is made durable before it is answered", True,
        engine="writeback",
    )
    packed_rings: bool = option(
        "--packed-rings", DISK, ON_OFF, "off: do not offer packed virtqueues", True,
        detail="For a frontend that takes them and then begins them wrongly: user-mode Linux takes all that "
        "is offered and tells the base of a packed ring without its wrap counter.",
    )
    poll_us: int | None = option(
        "--poll-us", DISK, POLLING_US,
        "how many microseconds to look for work before sleeping: 0 none, auto where it pays",
        least=0, most=10_000, default_text="auto", engine="poll_us",
    )
    threads: int = option(
        "--threads", DISK, NUMBER,
        "data threads: one keeps rings, order and log, the others do a share of the disks' work, the guest's "
        "queues spread over all of them",
        1, least=1, most=THREADS_MAX, engine="threads",
        detail="More than one is worth it where fast disks are busy and a core is free: see "
        "[performance.md](performance.md).",
    )

    destination_cache: Cache = option(
        "--destination-cache", MIRROR, one_of("none", "writeback"),
        "for a mirror start that names no cache mode", "none",
    )
    log_bytes: int = option(
        "--log-size", MIRROR, SIZE, "memory for writes on their way to the destination", 64 * MIB,
        least=LOG_BYTES_MIN, most=64 * GIB, engine="log_bytes",
    )
    max_lag_ms: int = option(
        "--max-lag-ms", MIRROR, MILLISECONDS,
        "in steady, slow the guest's writes so that the destination's lag stays below this", 500,
        least=1, most=60_000, engine="max_lag_us",
        detail="From half of it on, the guest's writes are slowed down, so that the lag stays below it.",
    )
    on_congestion: OnCongestion = option(
        "--on-congestion", MIRROR, one_of("block", "pull-ahead", engine_word="pull-ahead"),
        "a destination that is too slow: writes wait (block), or the guest gets ahead of it", "block",
        engine="pull_ahead",
        detail="Ahead, the guest goes on at full speed and the destination catches up later.",
    )
    congestion_fill_bytes: int | None = option(
        "--congestion-fill", MIRROR, SIZE,
        "with pull-ahead: the destination is too slow if so much waits for it in the log",
        default_text="7/8 of the log", engine="congestion_fill_bytes",
        detail="In `steady` it is also too slow when it lags by `--max-lag-ms`.",
    )
    destination_timeout_s: float = option(
        "--destination-timeout", MIRROR, SECONDS,
        "a destination for which a request has to wait longer is given up", 10.0,
        least=TIMEOUT_S_MIN, most=TIMEOUT_S_MAX, engine="destination_timeout_us",
        detail="The state is `degraded` then.",
    )
    stop_timeout_s: float = option(
        "--stop-timeout", MIRROR, SECONDS,
        "the same while the frontend stops a queue and the guest stands still", 1.0,
        least=TIMEOUT_S_MIN, most=TIMEOUT_S_MAX, engine="stop_timeout_us",
        detail="QEMU stops queues at a reset, a migration, the guest's end, and waits: the whole machine "
        "stands still meanwhile.",
    )
    on_destination_error: OnDestinationError = option(
        "--on-destination-error", MIRROR, one_of("degrade", "pause", engine_word="pause"),
        "when an up-to-date destination fails: go on without it, or hold flushes until another is", "degrade",
        engine="pause_on_destination_error",
    )
    destination_retry_s: float | None = option(
        "--destination-retry", MIRROR, SECONDS,
        "attach a destination that failed again after this time, then after twice as long",
        least=TIMEOUT_S_MIN, most=TIMEOUT_S_MAX, default_text="never; over a network 1s",
        detail="At most 5 minutes lie between two tries. A mirror that could not be resumed is tried, too. "
        "Only what differs is copied.",
    )
    fence: Literal["hand", "limit"] = option(
        "--fence", MIRROR, one_of("hand", "limit"),
        "when nothing of a lost connection is under way any more: you say so (mirror start --fenced), or the "
        "server lets nobody in before", "hand",
        detail="Of disks over a network whose kind does not see to it by itself. See "
        "[network.md](network.md).",
    )
    fence_command: str | None = option(
        "--fence-command", MIRROR, Kind("COMMAND"),
        "a command that makes that certain: it ends with 0 once the server process that was lost is gone",
        detail="Words, through no shell; the disk's name is in `VHOSTSYNC_DISK`. It may take 30 s, and runs "
        "as `--user`, outside of the sandbox.",
    )
    fenced: bool = option(
        "--fenced", MIRROR, FLAG,
        "for one start: nothing of a lost connection is under way any more at the disk that is served", False,
    )
    resume_mirror: bool = option(
        "--resume-mirror", MIRROR, ON_OFF, "off: do not begin the mirror again that the last run had", True,
        detail="See operations.md, \"Stopping and restarting\".",
    )
    copy_depth: int = option(
        "--copy-depth", MIRROR, NUMBER, "parts of the copy under way at once, 1 MiB each", 8,
        least=1, most=16, engine="copy_depth",
    )
    dirty_region_bytes: int | None = option(
        "--dirty-region-size", MIRROR, SIZE, "what one dirty bit stands for",
        least=DIRTY_REGION_BYTES_MIN, most=DIRTY_REGION_BYTES_MAX, default_text="64K, more above 2 TiB",
    )
    bitmap: Path | None = option(
        "--bitmap", MIRROR, PATH,
        "keep what differs there, so that after a restart or crash only that is copied",
    )
    al_extents: int = option(
        "--al-extents", MIRROR, NUMBER,
        "of the bitmap: parts of the disk that may be written to without a flush of it", 1024,
        least=AL_EXTENTS_MIN, most=AL_EXTENTS_MAX,
    )
    al_extent_bytes: int = option(
        "--al-extent-size", MIRROR, SIZE,
        "size of such a part; --al-extents times it is copied again after a host crash", 4 * MIB,
        least=DIRTY_REGION_BYTES_MIN, most=GIB,
    )
    read_fallback: bool = option(
        "--read-fallback", MIRROR, FLAG,
        "reads that the disk fails are answered from a destination that is up to date", False,
        engine="read_fallback",
    )
    on_source_error: OnSourceError = option(
        "--on-source-error", MIRROR, one_of("report", "switch", engine_word="switch"),
        "the guest gets the disk's errors, or moves to a destination that is up to date", "report",
        engine="switch_on_source_error",
        detail="After the move the guest sees no error.",
    )

    connections: int = option(
        "--connections", NETWORK, NUMBER,
        "to the server of a disk (NBD), where it lets several work together", 1,
        least=1, most=CONNECTIONS_MAX,
        detail="The loss of one is the loss of all.",
    )
    allow_plaintext: bool = option(
        "--allow-plaintext", NETWORK, FLAG,
        "the data of disks may go to other hosts without TLS: for a network that is trusted", False,
    )
    reconnect_timeout_s: float = option(
        "--reconnect-timeout", NETWORK, SECONDS,
        "so long a guest waits when the connection to its disk's server (NBD) is lost; then it gets errors",
        30.0, least=TIMEOUT_S_MIN, most=TIMEOUT_S_MAX,
        detail="What was not answered is sent again, and not before it is certain that the server has "
        "nothing of it under way any more (`--fence`).",
    )
    ceph_conf: Path | None = option(
        "--ceph-conf", NETWORK, PATH, "of `rbd:` disks: the cluster's configuration file",
        default_text="CEPH_CONF, CEPH_ARGS, or /etc/ceph/ceph.conf",
        detail="It is read once, at the start, as is the keyring.",
    )
    ceph_user: str | None = option(
        "--ceph-user", NETWORK, TEXT, "the cluster's user, without client.",
        default_text="CEPH_ARGS, or admin",
    )
    ceph_keyring: Path | None = option(
        "--ceph-keyring", NETWORK, PATH, "where that user's key is", default_text="as the configuration says"
    )
    break_lock: bool = option(
        "--break-lock", NETWORK, FLAG,
        "take the disk from whoever has it locked, and shut that one out for years: for one that is gone",
        False,
        detail="Of `rbd:` disks, and of the disk that is given alone. The lock of a process of this host "
        "that is gone is broken unasked. See [network.md](network.md).",
    )

    state_file: Path | None = option(
        "--state-file", STATE_RECORD, PATH, "where it is kept, best on neither disk",
        default_text="in the state directory",
    )
    no_state_file: bool = option(
        "--no-state-file", STATE_RECORD, FLAG,
        "keep none: after a switch nothing stops you from serving the old disk", False,
    )
    answer: Answer | None = None  # of the operator, to what the state record has asked: an option for each
    record_of_name: Path | None = None  # what the name leads to (record/names.py)

    control_path: Path | None = option(
        "--control", OPERATION, PATH, "make the control socket here",
        default_text="the vhost-user socket's path and .control, or control in /run/vhostsync/NAME",
    )
    metrics: Path | TcpAddress | None = option(
        "--metrics", OPERATION, Kind("PLACE", lambda text: parse_metrics(text)),
        "serve Prometheus metrics on this unix socket, or on ADDRESS:PORT",
    )
    name: str = option(
        "--name", OPERATION, TEXT,
        "the name that `vhostsync create` has given the disk, which finds the current one; the metrics' "
        "label vm", "", default_text="of the vhost-user socket, without its suffix",
        detail="With `--blk-file` it need not be such a name. See [node.md](node.md).",
    )
    log_format: LogFormat = log_format_option(OPERATION)
    log_level: LogLevel = log_level_option(OPERATION)

    user: str | None = option(
        "--user", PRIVILEGES, Kind("NAME[:GROUP]"),
        "become this user once the disk is open; it must own the folders of the sockets and the state",
        default_text="the user that starts it",
    )
    sandbox: Sandbox = option(
        "--sandbox", PRIVILEGES, one_of("auto", "off", "require"),
        "drop rights that are not needed: as many as the kernel can (auto), none, or all or fail", "auto",
    )
    allow_paths: tuple[Path, ...] = option(
        "--allow-path", PRIVILEGES, Kind("DIR", Path),
        "destinations may lie only here and beside the disk; the kernel withholds all else (repeatable)", (),
        repeatable=True,
    )

    allow_ports: tuple[int, ...] = option(
        "--allow-port", PRIVILEGES, NUMBER,
        "where the places of disks are given: a TCP port on which a server of disks may be (repeatable)",
        (), repeatable=True,
        detail="With `--allow-path` and with `--sandbox require` the kernel withholds all other ports (Linux "
        "6.7), but those of the disks that are known at the start.",
    )

    def __post_init__(self) -> None:
        for each, declared in options_of(self):
            value = getattr(self, each.name)
            if declared.kind is PATH and value is not None:
                object.__setattr__(self, each.name, absolute(value, declared.flag))
            elif declared.kind is DISK_NAME and value is not None:
                object.__setattr__(self, each.name, absolute_name(value, declared.flag))
        places = tuple(absolute(path, "--allow-path") for path in self.allow_paths)
        object.__setattr__(self, "allow_paths", places)
        for port in self.allow_ports:
            within("--allow-port", port, 1, 65535)
        check_options(self)
        self._place_by_name()
        self._check_places()
        self._check_device()
        self._check_mirror()
        self.check_group()
        if self.user is not None and not all(self.user.split(":", 1)):
            raise ConfigError(f"--user {self.user!r} is not NAME or NAME:GROUP.")
        if not self.name.isprintable() or len(self.name) > NAME_CHARACTERS_MAX:
            raise ConfigError(
                f"--name {self.name!r} must be at most {NAME_CHARACTERS_MAX} characters that can be printed."
            )

    def _place_by_name(self) -> None:
        """Where no place of a socket is given, and where a name is and no disk, the name has one."""
        if self.blk_file is None:
            if self.no_state_file:
                raise ConfigError("Give --blk-file: with --no-state-file no record says which disk is meant.")
            if self.state_file is None:
                if not self.name:
                    raise ConfigError("Give --blk-file, or the --name that `vhostsync create` has given one.")
                check_lineage_name(self.name, "--name")
        placed = self.blk_file is None or (self.socket_path is None and self.fd is None)
        if not placed or not is_lineage_name(self.name):
            return
        if self.control_path is None and self.socket_path is None:
            object.__setattr__(self, "control_path", control_of(self.name))
        if self.socket_path is None and self.fd is None:
            object.__setattr__(self, "socket_path", socket_of(self.name))

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
        check_socket_paths(sockets)
        files = [("--bitmap", self.bitmap), ("--state-file", self.state_file)]
        if self.state_file is not None:  # state_file.py makes these beside it
            for end in (".lock", ".new", ".backend"):
                files.append((f"the file {end} of --state-file", Path(f"{self.state_file}{end}")))
        seen: dict[str, str] = {}
        named = [(flag, str(path)) for flag, path in sockets + files if path is not None]
        disk = [("--blk-file", self.blk_file)] if self.blk_file is not None else []
        for flag, name in [*named[: len(sockets)], *disk, *named[len(sockets) :]]:
            if name in seen:
                raise ConfigError(
                    f"{flag} and {seen[name]} both name {name}; each needs a path of its own."
                )
            seen[name] = flag

    def _check_device(self) -> None:
        if not self.serial.isascii() or (self.serial and not self.serial.isprintable()):
            raise ConfigError(f"--serial {self.serial!r} has characters that are not printable ASCII.")
        if len(self.serial) > SERIAL_BYTES_MAX:
            raise ConfigError(f"--serial {self.serial!r} is longer than {SERIAL_BYTES_MAX} characters.")

    @property
    def fence_words(self) -> tuple[str, ...]:
        """Of --fence-command; none: there is none."""
        try:
            return tuple(shlex.split(self.fence_command or ""))
        except ValueError as error:
            raise ConfigError(f"--fence-command {self.fence_command!r}: {error}.") from error

    def _check_mirror(self) -> None:
        if self.fence_command is not None and not self.fence_words:
            raise ConfigError("--fence-command is empty; write a program and its arguments.")
        if self.fence_command is not None and self.fence == "limit":
            raise ConfigError("Give --fence-command or --fence limit, not both.")
        if self.congestion_fill_bytes is not None:
            within("--congestion-fill", self.congestion_fill_bytes, CONGESTION_FILL_MIN, self.log_bytes)
            if self.on_congestion == "block":
                raise ConfigError("--congestion-fill needs --on-congestion pull-ahead.")
        for flag, size in (
            ("--al-extent-size", self.al_extent_bytes),
            ("--dirty-region-size", self.dirty_region_bytes),
        ):
            if size is not None and size & (size - 1):
                raise ConfigError(f"{flag} {size} is not a power of two.")

    def region_bytes(self, capacity_bytes: int) -> int:
        """What one dirty bit stands for, on a disk of this size."""
        region = self.dirty_region_bytes or 64 * KIB
        while self.dirty_region_bytes is None and capacity_bytes // region > DIRTY_REGIONS:
            region *= 2
        return region

    @property
    def disk(self) -> str:
        """The name of the disk that is served, once it was found out (record/names.py)."""
        assert self.blk_file is not None
        return self.blk_file

    @property
    def names_ceph(self) -> bool:
        """It is said how a Ceph cluster is reached, so disks of one are to be expected."""
        return any(each is not None for each in (self.ceph_conf, self.ceph_user, self.ceph_keyring))

    @property
    def label(self) -> str:
        """What the machine is called in metrics; empty where nobody said and there is no socket's name."""
        return self.name or (self.socket_path.stem if self.socket_path is not None else "")

    @property
    def congestion_bytes(self) -> int:
        """So much of the log in use is congestion."""
        return self.congestion_fill_bytes or self.log_bytes // 8 * 7

    @property
    def network_use(self) -> NetworkUse:
        return NetworkUse(
            self.connections, self.allow_plaintext, self.reconnect_timeout_s,
            ceph_conf=str(self.ceph_conf) if self.ceph_conf is not None else None,
            ceph_user=self.ceph_user,
            ceph_keyring=str(self.ceph_keyring) if self.ceph_keyring is not None else None,
            break_lock_of=self.blk_file if self.break_lock else None,
        )  # fmt: skip

    def for_engine(self) -> dict[str, int]:
        """What the options say, as members of struct vs_engine_config."""
        return for_engine(self) | {
            "congestion_fill_bytes": self.congestion_bytes,
            "poll_us": POLL_AUTO if self.poll_us is None else self.poll_us,
        }

    @property
    def control_socket(self) -> Path | None:
        """Where the control socket is made; None where nobody said and there is no vhost-user path to
        derive it from."""
        if self.control_path is not None or self.socket_path is None:
            return self.control_path
        return self.socket_path.with_name(self.socket_path.name + ".control")
