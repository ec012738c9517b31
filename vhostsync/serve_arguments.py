# SPDX-License-Identifier: Apache-2.0
"""The arguments of `serve`, and the configuration that they make."""

import argparse
from pathlib import Path
from typing import Final

from . import argument_types as types
from . import config
from .argument_types import Parser
from .config import Answer

_SERVE_EXAMPLES: Final = """\
examples:
  vhostsync serve --socket-path /run/vm.sock --blk-file /disks/a.img
  vhostsync serve --socket-path /run/vm.sock --blk-file /dev/vg/vm --num-queues 4 --serial vm1
  qemu-system-x86_64 … -chardev socket,id=c,path=/run/vm.sock,reconnect=1 \\
      -device vhost-user-blk-pci,chardev=c,num-queues=4 \\
      -object memory-backend-memfd,id=m,size=1G,share=on -machine memory-backend=m

Sizes are bytes, or have a unit: 64M, 1GiB. Durations are seconds, or have a unit: 500ms, 10s.
It stays in the foreground; SIGTERM ends it cleanly. It exits 0 when told to end, 1 when it cannot
serve (the reason is on stderr), 2 when an option is wrong.
"""


def add_serve(commands: "argparse._SubParsersAction[Parser]") -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a disk to a virtual machine",
        description="Serve a disk to a virtual machine over a vhost-user socket.",
        epilog=_SERVE_EXAMPLES,
    )
    place = serve.add_argument_group("the socket (exactly one)")
    place.add_argument("--socket-path", type=Path, metavar="PATH", help="make the vhost-user socket here")
    place.add_argument("--fd", type=types.number, metavar="N", help="use this inherited socket")
    place.add_argument(
        "--print-capabilities", action="store_true", help="print what this backend can do as JSON, and exit"
    )
    disk = serve.add_argument_group("the disk")
    disk.add_argument(
        "--blk-file", type=Path, metavar="PATH", required=True, help="image file or block device"
    )
    disk.add_argument("--read-only", action="store_true", help="the guest may not write")
    disk.add_argument(
        "--format",
        choices=("raw",),
        dest="disk_format",
        help="raw: serve the disk as it is, although it looks like an image of another format",
    )
    disk.add_argument(
        "--cache", choices=("none", "writeback"), help="direct I/O (default), or through the page cache"
    )
    disk.add_argument(
        "--num-queues", type=types.number, metavar="N", help="queues offered (default 4, at most 64)"
    )
    disk.add_argument(
        "--serial", metavar="TEXT", help="serial number that the guest reads, up to 20 characters"
    )
    disk.add_argument(
        "--block-size",
        type=types.size,
        dest="block_bytes",
        metavar="SIZE",
        help="512 or 4096 (default: the disk's)",
    )
    disk.add_argument(
        "--write-cache",
        choices=("on", "off"),
        help="off: each write is made durable before it is answered (default on)",
    )
    disk.add_argument(
        "--poll-us",
        type=types.poll_us,
        metavar="auto|N",
        help="look for work so many microseconds before sleeping: 0 never, auto where it pays (default)",
    )
    disk.add_argument(
        "--threads",
        type=types.number,
        metavar="N",
        help="data threads: one keeps rings, order and log, the others do a share of the disks' work, the "
        "guest's queues spread over all of them (default 1; see docs/performance.md)",
    )
    mirror = serve.add_argument_group("the mirror")
    mirror.add_argument(
        "--destination-cache",
        choices=("none", "writeback"),
        help="for a mirror start that names none (default none)",
    )
    mirror.add_argument(
        "--log-size",
        type=types.size,
        dest="log_bytes",
        metavar="SIZE",
        help="memory for writes on their way (default 64M)",
    )
    mirror.add_argument(
        "--max-lag-ms",
        type=types.number,
        metavar="MS",
        help="in steady, slow the guest's writes so that the destination lags no more (default 500)",
    )
    mirror.add_argument(
        "--on-congestion",
        choices=("block", "pull-ahead"),
        help="a destination that is too slow: writes wait (block, default), or the guest gets ahead of it",
    )
    mirror.add_argument(
        "--congestion-fill",
        type=types.size,
        dest="congestion_fill_bytes",
        metavar="SIZE",
        help="with pull-ahead: the destination is too slow if so much waits for it in the log (default 7/8)",
    )
    mirror.add_argument(
        "--destination-timeout",
        type=types.seconds,
        dest="destination_timeout_s",
        metavar="TIME",
        help="a destination for which a request has to wait longer is given up (default 10s)",
    )
    mirror.add_argument(
        "--stop-timeout",
        type=types.seconds,
        dest="stop_timeout_s",
        metavar="TIME",
        help="the same while the frontend stops a queue and the guest stands still (default 1s)",
    )
    mirror.add_argument(
        "--on-destination-error",
        choices=("degrade", "pause"),
        help="when one that was up to date fails: go on without (default), or flushes wait for the next one",
    )
    mirror.add_argument(
        "--destination-retry",
        type=types.seconds,
        dest="destination_retry_s",
        metavar="TIME",
        help="attach one that failed again after so long, then after twice as long (default: never)",
    )
    mirror.add_argument(
        "--resume-mirror",
        choices=("on", "off"),
        help="off: do not begin the mirror again that the last run had (default on)",
    )
    mirror.add_argument(
        "--copy-depth", type=types.number, metavar="N", help="parts of the copy under way at once (default 8)"
    )
    mirror.add_argument(
        "--dirty-region-size",
        type=types.size,
        dest="dirty_region_bytes",
        metavar="SIZE",
        help="what one dirty bit stands for (default 64K, more above 2 TiB)",
    )
    mirror.add_argument(
        "--bitmap",
        type=Path,
        metavar="PATH",
        help="keep what differs there, so that after a restart or crash only that is copied",
    )
    mirror.add_argument(
        "--al-extents",
        type=types.number,
        metavar="N",
        help="of the bitmap: parts of the disk that may be written to without a flush of it (default 1024)",
    )
    mirror.add_argument(
        "--al-extent-size",
        type=types.size,
        dest="al_extent_bytes",
        metavar="SIZE",
        help="size of such a part; N times it is copied again after a host crash (default 4M)",
    )
    mirror.add_argument(
        "--read-fallback",
        action="store_true",
        help="reads that the disk fails are answered from a destination that is up to date",
    )
    mirror.add_argument(
        "--on-source-error",
        choices=("report", "switch"),
        help="the guest gets the disk's errors (default), or moves to a destination that is up to date",
    )
    record = serve.add_argument_group("the state record (which disk is the current one)")
    record.add_argument(
        "--state-file", type=Path, metavar="PATH", help="where it is kept, best on neither disk"
    )
    record.add_argument(
        "--no-state-file",
        action="store_true",
        help="keep none: after a switch nobody stops you from serving the old disk",
    )
    answers = record.add_mutually_exclusive_group()
    for answer, meaning in (
        (Answer.PROMOTE, "this disk is the current one from now on; the recorded one is lost for good"),
        (Answer.SAME_DISK, "this is the recorded current disk, although it cannot be recognised"),
        (Answer.NEW_DISK, "this disk is none that a record knows: begin a new record"),
    ):
        answers.add_argument(
            f"--{answer}", dest="answer", action="store_const", const=answer,
            help=f"answer to a start that was refused, for one start: {meaning}",
        )  # fmt: skip
    running = serve.add_argument_group("operation")
    running.add_argument(
        "--control",
        type=Path,
        dest="control_path",
        metavar="PATH",
        help="make the control socket here (default: the vhost-user socket's path and .control)",
    )
    running.add_argument(
        "--metrics",
        type=types.metrics_place,
        metavar="PLACE",
        help="serve Prometheus metrics on this unix socket or 127.0.0.1:PORT",
    )
    running.add_argument(
        "--name",
        metavar="TEXT",
        help="the machine's name: the label vm of every metric (default: of the vhost-user socket, "
        "without its suffix)",
    )
    running.add_argument(
        "--log-format", choices=("auto", "text", "json"), help="auto: text on a terminal, else JSON"
    )
    running.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="(default info)")
    _add_privileges(serve)


def _add_privileges(serve: argparse.ArgumentParser) -> None:
    rights = serve.add_argument_group("privileges")
    rights.add_argument(
        "--user",
        metavar="NAME[:GROUP]",
        help="become this user once the disk is open; it must own the folders of the sockets and the state",
    )
    rights.add_argument(
        "--sandbox",
        choices=("auto", "off", "require"),
        help="drop rights that are not needed: what the kernel has (auto, default), nothing, or all or fail",
    )
    rights.add_argument(
        "--allow-path",
        type=Path,
        action="append",
        dest="allow_paths",
        metavar="DIR",
        help="destinations may lie only here and beside the disk; the kernel withholds all else (repeatable)",
    )


def serve_config(options: argparse.Namespace) -> config.ServeConfig:
    """The configuration; what was not given keeps the default of ServeConfig. ConfigError."""
    given = {
        name: value
        for name, value in vars(options).items()
        if value is not None and name in config.ServeConfig.__dataclass_fields__
    }
    for switch in ("write_cache", "resume_mirror"):
        if switch in given:
            given[switch] = given[switch] == "on"
    if options.allow_paths is not None:
        given["allow_paths"] = tuple(options.allow_paths)
    return config.ServeConfig(**given)
