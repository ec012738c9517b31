# SPDX-License-Identifier: Apache-2.0
"""The client commands that speak to several backends at once: `switch` with more than one --control, and
`snapshot`."""

import argparse
from collections.abc import Sequence

from vhostsync.cli.group import Done, LateError, Plan, coordinate
from vhostsync.cli.operate import EXIT_OK, EXIT_TIMED_OUT, complain, print_json, say
from vhostsync.control.found_socket import Control


async def run(options: argparse.Namespace, controls: Sequence[Control]) -> int:
    """Exit code 4 where the deadline ended it. GroupError, UnreachableError."""
    plan = Plan(options.command, options.max_pause, options.deadline, getattr(options, "keep_mirror", False))
    try:
        done = await coordinate(controls, plan)
    except LateError as error:
        complain(str(error))
        return EXIT_TIMED_OUT
    if options.json:
        print_json(_json(done))
    elif plan.action == "switch":
        _say_switched(done)
    else:
        _say_taken(done)
    return EXIT_OK


def _json(done: Done) -> dict[str, object]:
    members = [{"control": str(member.control), **member.result} for member in done.members]
    return {"pause-us": done.pause_us, "attempts": done.attempts, "members": members}


def _held(done: Done) -> str:
    tries = "" if done.attempts == 1 else f", at try {done.attempts}"
    return f"It was paused for {done.pause_us / 1000:.1f} ms{tries}."


def _say_switched(done: Done) -> None:
    disks = ", ".join(member.result["source-path"] for member in done.members)
    say(f"The guest runs on {disks}. {_held(done)}")
    for member in done.members:
        if member.result["destination-path"]:
            say(f"{member.result['destination-path']} is the mirror of {member.result['source-path']} now.")


def _say_taken(done: Done) -> None:
    say(f"Copies of one instant, let go of by the mirrors. {_held(done).replace('It', 'The guest', 1)}")
    for member in done.members:
        say(f"  {member.result['destination-path']}  of {member.result['source-path']}")
