# SPDX-License-Identifier: Apache-2.0
"""The command line: each command, its arguments and its help. serve_arguments.py has those of `serve`."""

import argparse
import functools
from pathlib import Path
from typing import Any, Final

from vhostsync import __version__
from vhostsync.cli import argument_types as types
from vhostsync.cli.argument_types import Parser
from vhostsync.cli.exporter_arguments import add_exporter
from vhostsync.cli.fleet_arguments import add_create, add_evacuate, add_list, add_top
from vhostsync.cli.node_arguments import add_node
from vhostsync.cli.option_arguments import add_limits
from vhostsync.cli.receive_arguments import add_receive
from vhostsync.cli.serve_arguments import add_serve

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

With several --control, all disks of a guest are switched or none is:
  vhostsync switch --group vm1
  vhostsync switch --control /run/root.control --control /run/data.control
"""

_SNAPSHOT_EXAMPLES: Final = """\
examples:
  vhostsync snapshot                                    # of one disk
  vhostsync snapshot --group vm1
  vhostsync snapshot --control /run/root.control --control /run/data.control
  vhostsync mirror start /disks/b.img --wait            # afterwards: copies what differs by then

It needs mirrors that are steady, and ends them: the destinations together are what a power cut at that
instant would have left. They are closed when it returns. When it fails, all mirrors are as they were.
"""

_RESIZE_EXAMPLES: Final = """\
examples:
  truncate -s 20G /disks/a.img /disks/b.img             # both, where there is a mirror
  vhostsync resize
"""

_LIMIT_EXAMPLES: Final = """\
examples:
  vhostsync limit                                       # what holds now, and whom it made wait
  vhostsync limit --bps 100M                            # reads and writes together
  vhostsync limit --bps-wr 50M:200M:30s --iops 2000     # writes may reach 200M a second for 30 s
  vhostsync limit --bps none                            # the others stay
  vhostsync limit --none

A limit that is named is set whole, with its burst (RATE:BURST:TIME); what is not named stays. It holds until
the backend ends; for good, give `serve` the option of the same name (--limit-bps and so on). The copy of a
mirror has a limit of its own: mirror speed.
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


_UPGRADE: Final = """\
Put a backend of this version in the place of the one that runs, while its guest goes on. The new one loads
all that it needs first; then it takes over the disks, the mirror and the guest's connection, which stays
open: the guest waits for some tens of milliseconds and notices nothing else. A backend of a version that
cannot hand over is ended, and the guest's machine has to connect again by itself.
"""

_UPGRADE_EXAMPLES: Final = """\
examples:
  vhostsync upgrade --control /run/vm.sock.control
  vhostsync upgrade --control /run/vm.sock.control -- --socket-path /run/vm.sock --blk-file /disks/a.img

It exits 0 when the new one serves. If it is refused, nothing has changed.
"""

_RECORD: Final = """\
Show what the state record says: which disk is the current one, where both are and whether they answer, what
the other one is worth, what is in doubt, who uses it, and the command that comes next. No backend is needed,
and nothing is changed.
"""

_RECORD_EXAMPLES: Final = """\
examples:
  vhostsync record                                      # all that are in the state directory
  vhostsync record /disks/a.img                         # by a disk, even if it is gone
  vhostsync record --name vm1
  vhostsync record --json | jq -r '.[].good'
  vhostsync record /disks/a.img --forget                # both disks are gone for good

The state directory is $STATE_DIRECTORY, else /var/lib/vhostsync for root, else that of the user.
It exits 0 if a record was found, 1 if not.
"""


@functools.cache
def make_parser() -> argparse.ArgumentParser:
    """One for all: a node makes it before it forks."""
    parser = Parser(prog="vhostsync", description=_MAIN, epilog=_MAIN_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"vhostsync {__version__}")
    _add_control(parser, default=None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    add_serve(commands)
    add_receive(commands)
    add_exporter(commands)
    add_node(commands)
    add_create(commands)
    add_list(commands)
    add_evacuate(commands)
    add_top(commands)
    _add_client(commands, "status", "status", "show the disk, its guest and the mirror")
    watch = _add_client(commands, "watch", "watch", "show the progress and each event", _WATCH_EXAMPLES)
    watch.add_argument(
        "--interval",
        type=types.positive_seconds,
        default=1.0,
        metavar="TIME",
        help="how often to look (default 1s)",
    )
    _add_mirror(commands)
    _add_switch(commands)
    _add_snapshot(commands)
    _add_verify(commands)
    resize = _add_client(commands, "resize", "resize", "make the guest's disk larger", _RESIZE_EXAMPLES)
    resize.add_argument(
        "--size", type=types.size, metavar="SIZE", help="the new size (default: all that the disk has)"
    )
    _add_limit(commands)
    _add_record(commands)
    _add_client(commands, "stats", "stats", "show operations, bytes, errors and latencies")
    _add_client(
        commands, "rededicate", "rededicate",
        "give the disk of a receiver to whoever attaches it next: its owner's token is forgotten",
    )  # fmt: skip
    _add_upgrade(commands)
    leave = _add_client(
        commands, "quit", "quit_backend", "end the backend, after the mirror was brought up to date"
    )
    leave.add_argument("--force", action="store_true", help="do not bring the mirror up to date")
    leave.add_argument(
        "--timeout",
        type=types.positive_seconds,
        default=30.0,
        metavar="TIME",
        help="how long to wait for its end (default 30s)",
    )
    return parser


def _add_upgrade(commands: "argparse._SubParsersAction[Parser]") -> None:
    upgrade = commands.add_parser(
        "upgrade", help="put a backend of this version in the place of the one that runs",
        description=_UPGRADE, epilog=_UPGRADE_EXAMPLES,
    )  # fmt: skip
    _add_control(upgrade)
    upgrade.add_argument(
        "words", nargs="*", metavar="OPTION",
        help="what the new one is started with, as of `serve` (default: what the other was started with)",
    )  # fmt: skip
    upgrade.add_argument(
        "--force", action="store_true", help="although a copy is under way that begins again without --bitmap"
    )
    upgrade.add_argument(
        "--timeout", type=types.positive_seconds, default=120.0, metavar="TIME",
        help="how long to wait until it serves (default 2m)",
    )  # fmt: skip


def _add_limit(commands: "argparse._SubParsersAction[Parser]") -> None:
    limit = _add_client(commands, "limit", "limit", "show or set what the guest may do", _LIMIT_EXAMPLES)
    add_limits(limit)
    limit.add_argument("--none", action="store_true", dest="no_limits", help="no limit at all")


def _add_record(commands: "argparse._SubParsersAction[Parser]") -> None:
    record = commands.add_parser(
        "record", help="show which disk is the current one, without a backend", description=_RECORD,
        epilog=_RECORD_EXAMPLES,
    )  # fmt: skip
    record.add_argument(
        "where", type=types.disk_name, nargs="?", metavar="PATH",
        help="a disk (also a lost one, by its path), a state record, or a directory of records "
        "(default: all records in the state directory)",
    )  # fmt: skip
    record.add_argument(
        "--name", type=types.lineage_name, metavar="NAME", help="instead of PATH: the name of the disk"
    )
    record.add_argument("--json", action="store_true", help="print JSON, for scripts")
    record.add_argument(
        "--forget", action="store_true",
        help="remove the record of PATH: nobody knows any more which of its disks is the current one",
    )  # fmt: skip


def _add_control(parser: argparse.ArgumentParser, default: Any = argparse.SUPPRESS) -> None:
    parser.add_argument(
        "--control",
        type=Path,
        metavar="PATH",
        default=default,
        help="the backend's control socket (default: that of --name, or the environment's VHOSTSYNC_CONTROL)",
    )


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--name", type=types.lineage_name, metavar="NAME",
        help="the name that `vhostsync create` has given the disk: finds the control socket of its backend",
    )  # fmt: skip


def _add_several(parser: argparse.ArgumentParser) -> None:
    """Which backends, of a command that may speak to all disks of a guest."""
    parser.add_argument(
        "--control", type=Path, metavar="PATH", action="append", default=argparse.SUPPRESS,
        help="the backend's control socket (default: the environment's VHOSTSYNC_CONTROL)",
    )  # fmt: skip
    parser.add_argument(
        "--name", type=types.lineage_name, metavar="NAME", action="append",
        help="the name that `vhostsync create` has given the disk. --control and --name may be given several "
        "times, for several disks of a guest: all are done at one instant",
    )  # fmt: skip
    parser.add_argument(
        "--group", type=types.lineage_name, metavar="NAME",
        help="all disks that `vhostsync create --group NAME` has given to this group",
    )  # fmt: skip


def _add_client(
    commands: "argparse._SubParsersAction[Parser]",
    name: str,
    function: str,
    text: str,
    examples: str | None = None,
    *,
    several: bool = False,
) -> argparse.ArgumentParser:
    """`several`: it may speak to more than one backend."""
    parser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", epilog=examples
    )
    parser.set_defaults(function=function)
    if several:
        _add_several(parser)
    else:
        _add_control(parser)
        _add_name(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    return parser


def _add_mirror(commands: "argparse._SubParsersAction[Parser]") -> None:
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
        type=types.disk_name,
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
        type=types.speed,
        default=0,
        metavar="SIZE",
        help="limit of the copy, per second",
    )
    start.add_argument("--full", action="store_true", help="copy everything, even where less would do")
    start.add_argument(
        "--force", action="store_true", help="overwrite the destination, although it seems to hold something"
    )
    start.add_argument(
        "--fenced",
        action="store_true",
        help="the server process that a lost connection to it led to is gone: nothing of it is under way",
    )
    start.add_argument("--wait", action="store_true", help="return when the destination is up to date")
    start.add_argument(
        "--timeout", type=types.positive_seconds, metavar="TIME", help="with --wait: for how long"
    )
    cancel = _add_client(
        actions, "cancel", "mirror_cancel", "let go of the destination; if steady, as a copy of this moment"
    )
    cancel.add_argument("--force", action="store_true", help="at once, without bringing it up to date")
    speed = _add_client(actions, "speed", "mirror_speed", "change the limit of the copy that runs")
    speed.add_argument("speed", type=types.speed, metavar="SIZE", help="per second, such as 100M; or none")


def _add_switch(commands: "argparse._SubParsersAction[Parser]") -> None:
    switch = _add_client(
        commands, "switch", "switch", "move the guest to the destination", _SWITCH_EXAMPLES, several=True
    )
    _add_patience(switch)
    switch.add_argument("--keep-mirror", action="store_true", help="the old disk becomes the destination")
    switch.add_argument(
        "--accept-unreadable",
        action="store_true",
        help="although parts of the source are unreadable or in doubt (status lists them)",
    )
    switch.add_argument(
        "--accept-different",
        action="store_true",
        help="although a verification has found that the destination differs (status says since when)",
    )


def _add_patience(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deadline", type=types.positive_seconds, default=30.0, metavar="TIME",
        help="how long to try (default 30s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-pause", type=types.positive_seconds, default=0.5, metavar="TIME",
        help="how long one try may hold the guest's requests (default 500ms)",
    )  # fmt: skip


def _add_snapshot(commands: "argparse._SubParsersAction[Parser]") -> None:
    snapshot = _add_client(
        commands, "snapshot", "snapshot", "let the destination go, as a copy of one instant of the guest",
        _SNAPSHOT_EXAMPLES, several=True,
    )  # fmt: skip
    _add_patience(snapshot)


def _add_verify(commands: "argparse._SubParsersAction[Parser]") -> None:
    verify = _add_client(
        commands, "verify", "verify", "compare both disks while the guest runs", _VERIFY_EXAMPLES
    )
    verify.add_argument("--repair", action="store_true", help="copy what differs to the destination again")
    verify.add_argument("--speed", type=types.speed, default=0, metavar="SIZE", help="limit, per second")
    verify.add_argument("--wait", action="store_true", help="return when it is over, with its result")
    _add_client(commands, "verify-cancel", "verify_cancel", "end the verification that runs")
