# SPDX-License-Identifier: Apache-2.0
"""The commands that are about the disks of this host: each prints and returns an exit code."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, Final

import anyio

from vhostsync.cli.disk_words import lag, state
from vhostsync.cli.show import table
from vhostsync.errors import ConfigError
from vhostsync.fleet.disks import host_disks
from vhostsync.fleet.group import groups_of, is_one_instant, what_is_left, worth_of_group
from vhostsync.fleet.host_disk import HostDisk
from vhostsync.mirror_target import MirrorTarget
from vhostsync.printable import printable
from vhostsync.record.names import Names
from vhostsync.record.state_index import default_directory

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1

_HEADINGS: Final = ("NAME", "STATE", "LAG", "GUEST", "DISK", "OTHER")


def create(options: argparse.Namespace) -> int:
    """`vhostsync create`."""
    if options.if_new and Names(default_directory()).find(options.name) is not None:
        return EXIT_OK
    if options.mirror is None and (options.create_mirror or options.force):
        raise ConfigError("--create-mirror and --force are about the mirror; name it with --mirror.")
    from vhostsync.device.new_disk import NewDisk, create_disk  # needs the extension

    mirror = None
    if options.mirror is not None:
        mirror = MirrorTarget(options.mirror, create=options.create_mirror, force=options.force)
    lineage = create_disk(
        NewDisk(name=options.name, disk=options.disk, group=options.group, mirror=mirror)
    )
    if options.json:
        made = {"name": lineage.name, "group": lineage.group, "record": str(lineage.record)}
        sys.stdout.write(json.dumps(made) + "\n")
    else:
        disk, name = printable(options.disk), lineage.name
        sys.stdout.write(f"{name} stands for {disk}; now: vhostsync serve --name {name}\n")
    return EXIT_OK


def evacuate(options: argparse.Namespace) -> int:
    """`vhostsync evacuate`."""
    from vhostsync.cli.evacuate import run  # what only it needs

    return anyio.run(run, options)


def top(options: argparse.Namespace) -> int:
    """`vhostsync top`."""
    from vhostsync.cli.top import run  # what only it needs

    return anyio.run(run, options)


def list_disks(options: argparse.Namespace) -> int:
    """`vhostsync list`."""
    disks = anyio.run(host_disks)
    for disk in disks:
        if disk.problem is not None:
            sys.stderr.write(f"vhostsync: {printable(disk.shown_name)}: {printable(disk.problem)}\n")
    if options.json:
        sys.stdout.write(json.dumps(_json(disks)) + "\n")
    elif disks:
        sys.stdout.write(table([_HEADINGS, *map(_row, disks)]))
        sys.stdout.writelines(_group_line(*group) for group in groups_of(disks).items())
    else:
        sys.stdout.write("no disk of this host is known; `vhostsync create` gives one a name\n")
    return EXIT_FAILED if any(disk.problem is not None for disk in disks) else EXIT_OK


def _json(disks: Sequence[HostDisk]) -> list[dict[str, Any]]:
    worths = {group: worth_of_group(of_group) for group, of_group in groups_of(disks).items()}
    instants = {group: is_one_instant(of_group) for group, of_group in groups_of(disks).items()}
    return [
        {
            **disk.in_json(),
            "group-worth": worths.get(disk.group or ""),
            "group-one-instant": instants.get(disk.group or ""),
        }
        for disk in disks
    ]


def _group_line(group: str, disks: Sequence[HostDisk]) -> str:
    worth = worth_of_group(disks)
    text = f"group {group}: its other disks together are {worth or 'of unknown worth'}"
    if worth == "outdated":
        text += ", all of one instant" if is_one_instant(disks) else ", and not of one instant"
    left = what_is_left(disks)
    return printable(text if left is None else f"{text}; {left}") + "\n"


def _row(disk: HostDisk) -> Sequence[str]:
    name = disk.shown_name if disk.name is not None else f"({disk.shown_name})"
    other = "-" if disk.other is None else f"{disk.other} ({disk.worth or 'of unknown worth'})"
    return tuple(map(printable, (name, state(disk), lag(disk), disk.guest or "-", disk.disk or "-", other)))
