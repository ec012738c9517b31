# SPDX-License-Identifier: Apache-2.0
"""The arguments of the commands that are about the disks of this host, and not about one backend."""

import argparse
from typing import Final

from vhostsync.cli import argument_types as types
from vhostsync.cli.argument_types import Parser

_CREATE: Final = """\
Give a disk a name. From then on the name stands for the machine's disk, whichever that is: the name finds the
state record, and the record says which disk is the current one. Nothing has to be edited after a switch.
No backend is needed. Where the disk has no state record yet, one is begun; one that it has is kept as it is,
and its backend may run meanwhile.
"""

_CREATE_EXAMPLES: Final = """\
how it goes:
  vhostsync create vm1 --disk /disks/vm1.img
  vhostsync serve --name vm1                            # or: systemctl start vhostsync@vm1.socket
  vhostsync mirror start /mnt/new/vm1.img --create --wait --name vm1
  vhostsync switch --name vm1
  systemctl restart vhostsync@vm1                       # serves /mnt/new/vm1.img

examples:
  vhostsync create vm1 --disk /disks/vm1.img --mirror /mnt/b/vm1.img --create-mirror
                                         # the first start begins the mirror
  vhostsync create vm1-data --disk /dev/vg/data --group vm1
  STATE_DIRECTORY=/var/lib/vhostsync/vm1 vhostsync create vm1 --disk /disks/vm1.img
                                         # where each backend has a user of its own

Root becomes the user whom the state directory belongs to, so that the backends can read what is made.
It exits 0 when the name stands for the disk, 1 when it was refused (nothing was changed; the reason is on
stderr). `vhostsync record --name vm1 --forget` takes the name and the record away.
"""

_LIST: Final = """\
Show all disks of this host: those that a state record knows, and those whose backends run.
"""

_LIST_EXAMPLES: Final = """\
examples:
  vhostsync list
  vhostsync list --json | jq -r '.[] | select(.state != "steady") | .label'

the columns:
  STATE   of the mirror: passthrough (there is none), syncing, steady, ahead, degraded; stopped: no backend
          runs; unknown: one does not answer, or a record cannot be read (the reason is on stderr)
  LAG     how far the other disk is behind
  GUEST   runs (it uses the disk), connected, none
  DISK    the current one: what a start by the name would serve
  OTHER   the destination of the mirror, or the last one, and what it is worth if the current disk is lost now

Below them, a line for each group: what the other disks of its members together are worth, which is as much as
the worst of them, and what is left to do where a switch of the group was cut off.

It exits 0, or 1 if any is unknown.
"""

_EVACUATE: Final = """\
Move all disks of this host that lie at a place to another one, so many at a time: each is mirrored there and,
with --switch, its guest moved. The guests run on meanwhile.
"""

_EVACUATE_EXAMPLES: Final = """\
examples:
  vhostsync evacuate /mnt/old --to /mnt/new --dry-run
  vhostsync evacuate /mnt/old --to /mnt/new --total-speed 500M --switch
  vhostsync evacuate /mnt/old --to rbd:pool --parallel 8 --switch --json >>evacuation.json
  vhostsync evacuate rbd:pool --to /mnt/new

A disk lies where its name leads to (links are followed), a block device where it has its name. In --to it
has the name of its file; where another disk has that, too, the disk's own name stands behind it. A file that
is there already is never overwritten, unless it is known as this disk's own mirror.

Interrupted, it leaves the copies to their backends, which go on at the speed that they have. Started again,
it goes on with what is left. One disk that fails stops no other, and is named at the end.

exit codes:
  0    all are done: moved, or, without --switch, up to date; or there is none
  1    some have failed, or could not be looked at; the others are done
  2    wrong usage
  130  interrupted
"""


def add_evacuate(commands: "argparse._SubParsersAction[Parser]") -> None:
    evacuate = commands.add_parser(
        "evacuate", help="move all disks that lie at a place to another one", description=_EVACUATE,
        epilog=_EVACUATE_EXAMPLES,
    )  # fmt: skip
    evacuate.set_defaults(function="evacuate")
    evacuate.add_argument(
        "place", type=types.disk_place, metavar="PLACE", help="a directory or a mount; or rbd:POOL"
    )
    evacuate.add_argument(
        "--to", type=types.disk_place, metavar="PLACE", required=True, help="a directory; or rbd:POOL"
    )
    evacuate.add_argument(
        "--parallel", type=types.positive_number, default=4, metavar="N",
        help="so many disks at a time (default 4)",
    )  # fmt: skip
    evacuate.add_argument(
        "--total-speed", type=types.speed, default=0, metavar="SIZE",
        help="limit of all copies together, per second, shared among those that run",
    )  # fmt: skip
    evacuate.add_argument("--switch", action="store_true", help="move each guest once its disk is up to date")
    evacuate.add_argument("--dry-run", action="store_true", help="show what would be done, and do nothing")
    evacuate.add_argument(
        "--json", action="store_true", help="print a line of JSON for each change, for scripts"
    )

_TOP: Final = """\
Show all disks of this host live, the worst first: what is wrong, how far the other disk is behind, how much
the guest writes and the copy brings.
"""

_TOP_EXAMPLES: Final = """\
keys:
  t l r n      sort by trouble, lag, rate (the guest's writes), name
  up down j k  choose a disk; Page Up, Page Down
  Enter        its details; q or Esc goes back
  q            quit
"""


def add_top(commands: "argparse._SubParsersAction[Parser]") -> None:
    top = commands.add_parser(
        "top", help="show all disks of this host live", description=_TOP, epilog=_TOP_EXAMPLES
    )
    top.set_defaults(function="top")
    top.add_argument(
        "--interval", type=types.positive_seconds, default=2.0, metavar="TIME",
        help="how often to look (default 2s)",
    )  # fmt: skip


def add_create(commands: "argparse._SubParsersAction[Parser]") -> None:
    create = commands.add_parser(
        "create", help="give a disk a name, by which it is served from then on", description=_CREATE,
        epilog=_CREATE_EXAMPLES,
    )  # fmt: skip
    create.set_defaults(function="create")
    create.add_argument("name", type=types.lineage_name, metavar="NAME", help="such as vm1")
    create.add_argument(
        "--disk", type=types.disk_name, metavar="PATH", required=True,
        help="the current disk: an image file or a block device",
    )  # fmt: skip
    create.add_argument(
        "--group", type=types.lineage_name, metavar="NAME",
        help="the group that it belongs to: the disks of one machine",
    )  # fmt: skip
    create.add_argument(
        "--mirror", type=types.disk_name, metavar="PATH", help="mirror it there, from the first start on"
    )
    create.add_argument(
        "--create-mirror", action="store_true", help="make the mirror's image file, at the size of the disk"
    )
    create.add_argument(
        "--force", action="store_true", help="overwrite the mirror, although it seems to hold something"
    )
    create.add_argument(
        "--if-new", action="store_true",
        help="where there is a disk of that name, leave everything as it is, and succeed",
    )  # fmt: skip
    create.add_argument("--json", action="store_true", help="print JSON, for scripts")


def add_list(commands: "argparse._SubParsersAction[Parser]") -> None:
    listing = commands.add_parser(
        "list", help="show all disks of this host", description=_LIST, epilog=_LIST_EXAMPLES
    )
    listing.set_defaults(function="list_disks")
    listing.add_argument("--json", action="store_true", help="print JSON, for scripts")
