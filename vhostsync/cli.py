# SPDX-License-Identifier: Apache-2.0
"""The command line: arguments to a configuration and a command; exit codes.

`vhostsync --socket-path=… --blk-file=…` without a word means `serve`: that is how programs call a
vhost-user backend (QEMU docs/interop/vhost-user.rst, "Backend program conventions").

Only what parsing needs is imported here, so that --help and --print-capabilities are quick and work without
the C extension."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from . import __version__, config
from .errors import ConfigError, UnreachableError, VhostsyncError

CAPABILITIES: Final = {"type": "block", "features": ["read-only", "blk-file"]}

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_TIMED_OUT: Final = 4
EXIT_INTERRUPTED: Final = 130

_OF_THE_PROGRAM: Final = ("-h", "--help", "--version", "--control")
"""Options that do not mean `serve` when they come first."""

_EXIT_CODES: Final = """\
exit codes:
  0    done
  1    it failed or was refused; the reason is on stderr
  2    wrong usage
  3    the backend cannot be reached
  4    it was not done in time (mirror start --wait --timeout, switch, quit)
  130  interrupted
"""

_MAIN: Final = """\
Serve a disk to a virtual machine (vhost-user), mirror it to a second disk
while the machine runs, and move the machine to that disk on command.
"""

_MAIN_EXAMPLES: Final = f"""\
how it goes:
  vhostsync serve --socket-path /run/vm.sock --blk-file /disks/a.img
                                         # then start the guest on /run/vm.sock
  export VHOSTSYNC_CONTROL=/run/vm.sock.control
  vhostsync mirror start /disks/b.img --create --wait
  vhostsync status
  vhostsync switch

{_EXIT_CODES}"""

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

_START_EXAMPLES: Final = """\
examples:
  vhostsync mirror start /disks/b.img --create          # and return
  vhostsync mirror start /dev/vg/b --wait               # until it is up to date
  vhostsync mirror start /disks/b.img --speed 100M --wait --timeout 1h

With --wait: 0 when the destination is up to date, 1 when the mirror failed or was cancelled, 4 when
--timeout has passed (the copy goes on; `mirror cancel` ends it).
"""

_SWITCH_EXAMPLES: Final = """\
examples:
  vhostsync switch                                      # and leave the old disk alone
  vhostsync switch --keep-mirror                        # the old disk becomes the mirror
  vhostsync switch --max-pause 50ms --deadline 1m --json

It needs a mirror that is steady. When it fails, the guest is where it was and the mirror is as it was.
Exit code 4 says that the deadline ended it.
"""

_RESIZE_EXAMPLES: Final = """\
examples:
  truncate -s 20G /disks/a.img /disks/b.img             # both, where there is a mirror
  vhostsync resize
"""

_VERIFY_EXAMPLES: Final = """\
examples:
  vhostsync verify --wait                               # 0: equal, 1: not, or not finished
  vhostsync verify --repair --speed 200M --wait

It needs a mirror that is steady, and does not stop it. Ranges in doubt are skipped.
"""

_WATCH_EXAMPLES: Final = """\
examples:
  vhostsync watch
  vhostsync watch --json | jq -c 'select(.event == "MIRROR_STATE_CHANGE") | .data'

Shows what the mirror does and each event, until Ctrl-C or the end of the backend. With --json: a line for
each event, as the control socket sends it, and {"mirror": …} (query-mirror) at each interval.
"""


class _Parser(argparse.ArgumentParser):
    """No abbreviated options: a script that uses one would break when another option is added."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**kwargs)


def _value(parse: Callable[[str], Any], name: str) -> Callable[[str], Any]:
    """`parse` as argparse calls it, with its sentence as the error."""

    def converted(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    converted.__name__ = name  # argparse shows it
    return converted


_size = _value(config.parse_bytes, "size")
_seconds = _value(config.parse_seconds, "duration")
_metrics = _value(config.parse_metrics, "place")
_poll_us = _value(config.parse_poll_us, "time")


def _positive(text: str) -> float:
    seconds = float(config.parse_seconds(text))
    if seconds <= 0:
        raise ConfigError("It must be longer than nothing.")
    return seconds


def _speed(text: str) -> int:
    return 0 if text == "none" else config.check_speed(config.parse_bytes(text.removesuffix("/s")))


def _absolute(text: str) -> Path:
    path = Path(text).absolute()
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"The path {text!r} is not UTF-8; the control socket cannot carry it.") from error
    return path


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vhostsync", description=_MAIN, epilog=_MAIN_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"vhostsync {__version__}")
    _add_control(parser, default=None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    _add_serve(commands)
    _add_client(commands, "status", "status", "show the disk, its guest and the mirror")
    watch = _add_client(commands, "watch", "watch", "show the progress and each event", _WATCH_EXAMPLES)
    watch.add_argument(
        "--interval",
        type=_value(_positive, "duration"),
        default=1.0,
        metavar="TIME",
        help="how often to look (default 1s)",
    )
    _add_mirror(commands)
    _add_switch(commands)
    _add_verify(commands)
    resize = _add_client(commands, "resize", "resize", "make the guest's disk larger", _RESIZE_EXAMPLES)
    resize.add_argument(
        "--size", type=_size, metavar="SIZE", help="the new size (default: all that the disk has)"
    )
    _add_client(commands, "stats", "stats", "show operations, bytes, errors and latencies")
    leave = _add_client(
        commands, "quit", "quit_backend", "end the backend, after the mirror was brought up to date"
    )
    leave.add_argument("--force", action="store_true", help="do not bring the mirror up to date")
    leave.add_argument(
        "--timeout",
        type=_value(_positive, "duration"),
        default=30.0,
        metavar="TIME",
        help="how long to wait for its end (default 30s)",
    )
    return parser


def _add_control(parser: argparse.ArgumentParser, default: Any = argparse.SUPPRESS) -> None:
    parser.add_argument(
        "--control",
        type=Path,
        metavar="PATH",
        default=default,
        help="the backend's control socket (default: the environment's VHOSTSYNC_CONTROL)",
    )


def _add_client(
    commands: "argparse._SubParsersAction[_Parser]",
    name: str,
    function: str,
    text: str,
    examples: str | None = None,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", epilog=examples
    )
    parser.set_defaults(function=function)
    _add_control(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    return parser


def _add_mirror(commands: "argparse._SubParsersAction[_Parser]") -> None:
    mirror = commands.add_parser("mirror", help="start, cancel or pace the mirror", description="The mirror.")
    actions = mirror.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    start = _add_client(
        actions,
        "start",
        "mirror_start",
        "copy the disk to a destination and keep it current",
        _START_EXAMPLES,
    )
    start.add_argument(
        "destination",
        type=_value(_absolute, "path"),
        metavar="DESTINATION",
        help="an image file or a block device",
    )
    start.add_argument("--create", action="store_true", help="make the image file, at the size of the disk")
    start.add_argument(
        "--cache",
        choices=("none", "writeback"),
        help="direct I/O, or through the page cache (default: as `serve` was told)",
    )
    start.add_argument(
        "--speed",
        type=_value(_speed, "speed"),
        default=0,
        metavar="SIZE",
        help="limit of the copy, per second",
    )
    start.add_argument("--full", action="store_true", help="copy everything, even where less would do")
    start.add_argument("--wait", action="store_true", help="return when the destination is up to date")
    start.add_argument(
        "--timeout", type=_value(_positive, "duration"), metavar="TIME", help="with --wait: for how long"
    )
    cancel = _add_client(
        actions, "cancel", "mirror_cancel", "let go of the destination; if steady, as a copy of this moment"
    )
    cancel.add_argument("--force", action="store_true", help="at once, without bringing it up to date")
    speed = _add_client(actions, "speed", "mirror_speed", "change the limit of the copy that runs")
    speed.add_argument(
        "speed", type=_value(_speed, "speed"), metavar="SIZE", help="per second, such as 100M; or none"
    )


def _add_switch(commands: "argparse._SubParsersAction[_Parser]") -> None:
    switch = _add_client(commands, "switch", "switch", "move the guest to the destination", _SWITCH_EXAMPLES)
    switch.add_argument(
        "--deadline",
        type=_value(_positive, "duration"),
        default=30.0,
        metavar="TIME",
        help="how long to try (default 30s)",
    )
    switch.add_argument(
        "--max-pause",
        type=_value(_positive, "duration"),
        default=0.5,
        metavar="TIME",
        help="how long one try may hold the guest's requests (default 500ms)",
    )
    switch.add_argument("--keep-mirror", action="store_true", help="the old disk becomes the destination")
    switch.add_argument(
        "--accept-unreadable",
        action="store_true",
        help="although parts of the source are unreadable or in doubt (status lists them)",
    )


def _add_verify(commands: "argparse._SubParsersAction[_Parser]") -> None:
    verify = _add_client(
        commands, "verify", "verify", "compare both disks while the guest runs", _VERIFY_EXAMPLES
    )
    verify.add_argument("--repair", action="store_true", help="copy what differs to the destination again")
    verify.add_argument(
        "--speed", type=_value(_speed, "speed"), default=0, metavar="SIZE", help="limit, per second"
    )
    verify.add_argument("--wait", action="store_true", help="return when it is over, with its result")
    _add_client(commands, "verify-cancel", "verify_cancel", "end the verification that runs")


def _add_serve(commands: "argparse._SubParsersAction[_Parser]") -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a disk to a virtual machine",
        description="Serve a disk to a virtual machine over a vhost-user socket.",
        epilog=_SERVE_EXAMPLES,
    )
    place = serve.add_argument_group("the socket (exactly one)")
    place.add_argument("--socket-path", type=Path, metavar="PATH", help="make the vhost-user socket here")
    place.add_argument("--fd", type=int, metavar="N", help="use this inherited socket")
    place.add_argument(
        "--print-capabilities", action="store_true", help="print what this backend can do as JSON, and exit"
    )
    disk = serve.add_argument_group("the disk")
    disk.add_argument(
        "--blk-file", type=Path, metavar="PATH", required=True, help="image file or block device"
    )
    disk.add_argument("--read-only", action="store_true", help="the guest may not write")
    disk.add_argument(
        "--cache", choices=("none", "writeback"), help="direct I/O (default), or through the page cache"
    )
    disk.add_argument("--num-queues", type=int, metavar="N", help="queues offered (default 4, at most 64)")
    disk.add_argument(
        "--serial", metavar="TEXT", help="serial number that the guest reads, up to 20 characters"
    )
    disk.add_argument(
        "--block-size",
        type=_size,
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
        type=_poll_us,
        metavar="auto|N",
        help="look for work so many microseconds before sleeping: 0 never, auto where it pays (default)",
    )
    mirror = serve.add_argument_group("the mirror")
    mirror.add_argument(
        "--destination-cache",
        choices=("none", "writeback"),
        help="for a mirror start that names none (default none)",
    )
    mirror.add_argument(
        "--log-size",
        type=_size,
        dest="log_bytes",
        metavar="SIZE",
        help="memory for writes on their way (default 64M)",
    )
    mirror.add_argument(
        "--max-lag-ms",
        type=int,
        metavar="MS",
        help="slow the guest's writes before the destination lags more (default 500)",
    )
    mirror.add_argument(
        "--on-congestion",
        choices=("block", "pull-ahead"),
        help="a destination that is too slow: writes wait (block, default), or the guest gets ahead of it",
    )
    mirror.add_argument(
        "--congestion-fill",
        type=_size,
        dest="congestion_fill_bytes",
        metavar="SIZE",
        help="with pull-ahead: so much of the log in use is too slow (default 7/8 of it)",
    )
    mirror.add_argument(
        "--destination-timeout",
        type=_seconds,
        dest="destination_timeout_s",
        metavar="TIME",
        help="nothing waits longer for the destination; then the mirror is degraded (default 10s)",
    )
    mirror.add_argument(
        "--stop-timeout",
        type=_seconds,
        dest="stop_timeout_s",
        metavar="TIME",
        help="the same while the frontend stops a queue (default 1s)",
    )
    mirror.add_argument(
        "--destination-retry",
        type=_seconds,
        dest="destination_retry_s",
        metavar="TIME",
        help="attach one that failed again after so long, then after twice as long (default: never)",
    )
    mirror.add_argument(
        "--copy-depth", type=int, metavar="N", help="parts of the copy under way at once (default 8)"
    )
    mirror.add_argument(
        "--dirty-region-size",
        type=_size,
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
        type=int,
        metavar="N",
        help="of the bitmap: parts of the disk that may be written to without a flush of it (default 1024)",
    )
    mirror.add_argument(
        "--al-extent-size",
        type=_size,
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
        type=_metrics,
        metavar="PLACE",
        help="serve Prometheus metrics on this unix socket or 127.0.0.1:PORT",
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


def _with_serve(arguments: Sequence[str]) -> list[str]:
    """The arguments with the word `serve` where QEMU's conventions leave it out."""
    if arguments and arguments[0].startswith("-") and arguments[0].split("=")[0] not in _OF_THE_PROGRAM:
        return ["serve", *arguments]
    return list(arguments)


def serve_config(options: argparse.Namespace) -> config.ServeConfig:
    """The configuration; what was not given keeps the default of ServeConfig. ConfigError."""
    given = {
        name: value
        for name, value in vars(options).items()
        if value is not None and name in config.ServeConfig.__dataclass_fields__
    }
    if options.write_cache is not None:
        given["write_cache"] = options.write_cache == "on"
    if options.allow_paths is not None:
        given["allow_paths"] = tuple(options.allow_paths)
    return config.ServeConfig(**given)


def _serve(settings: config.ServeConfig) -> int:
    try:
        from .daemon import run
    except ImportError as error:
        return _failed(f"{error} (the data plane is a C extension; `pip install .` builds it)", EXIT_FAILED)
    return run(settings)


def _operate(options: argparse.Namespace) -> int:
    import anyio

    from . import operate

    return anyio.run(operate.run, getattr(operate, options.function), options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Ends the process itself where argparse does (--help, wrong
    usage)."""
    words = _with_serve(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["serve"] and "--print-capabilities" in words:
        print(json.dumps(CAPABILITIES))
        return EXIT_OK
    parser = _parser()
    options = parser.parse_args(words)
    try:
        if options.command == "serve":
            return _serve(_or_usage(parser, lambda: serve_config(options)))
        if options.control is None:
            inherited = os.environ.get("VHOSTSYNC_CONTROL")
            if not inherited:
                parser.error("which backend? Give --control PATH or set VHOSTSYNC_CONTROL")
            options.control = Path(inherited)
        return _operate(options)
    except UnreachableError as error:
        return _failed(error, EXIT_UNREACHABLE)
    except VhostsyncError as error:
        return _failed(error, EXIT_FAILED)
    except TimeoutError:
        return _failed("The backend did not do that in time; it may still be at it.", EXIT_TIMED_OUT)
    except BrokenPipeError:
        # The reader of our output is gone; the interpreter would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _or_usage(parser: argparse.ArgumentParser, make: Callable[[], config.ServeConfig]) -> config.ServeConfig:
    try:
        return make()
    except ConfigError as error:
        _usage(parser, str(error))


def _usage(parser: argparse.ArgumentParser, text: str) -> NoReturn:
    parser.exit(EXIT_USAGE, f"vhostsync: {text}\n")


def _failed(error: object, code: int) -> int:
    print(f"vhostsync: {error}", file=sys.stderr)
    return code
