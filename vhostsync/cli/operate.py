# SPDX-License-Identifier: Apache-2.0
"""The client commands of the command line: each connects to the control socket, asks, prints and returns an
exit code.

What a command prints for people goes to stdout; with --json stdout has JSON and nothing else.
"""

import argparse
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import anyio

from vhostsync.cli import show
from vhostsync.control.client import ControlClient, RefusedError, connect, may_come_back
from vhostsync.control.found_socket import AGAIN_S
from vhostsync.errors import ControlError, MirrorError, UnreachableError
from vhostsync.limits import KINDS, NO_LIMIT
from vhostsync.printable import printable, size

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_TIMED_OUT: Final = 4

REPLY_GRACE_S: Final = 30.0
"""How long after its own deadline `switch` may take to answer (it aborts, and tells why)."""

AGAIN_WITHIN_S: Final = 1.0
"""Who asks a backend that was upgraded meanwhile asks the next one, if the first has not taken longer."""

LOOK_EVERY_S: Final = 1.0
LOOK_EVERY_TERMINAL_S: Final = 0.2

Command = Callable[[ControlClient, argparse.Namespace], Awaitable[int]]


async def run(command: Command, options: argparse.Namespace) -> int:
    """Connect, then `command`. UnreachableError, RefusedError, ControlError, MirrorError."""
    began_s = time.monotonic()
    for pause_s in AGAIN_S if command in (status, stats) else ():
        try:
            return await _run_once(command, options)
        except ControlError as error:
            late = time.monotonic() - began_s > AGAIN_WITHIN_S
            if late or not may_come_back(options.control, error):
                raise
        await anyio.sleep(pause_s)
    return await _run_once(command, options)


async def _run_once(command: Command, options: argparse.Namespace) -> int:
    async with connect(options.control) as client:
        return await command(client, options)


def say(text: str) -> None:
    _show(printable(text) + "\n")


def _show(text: str) -> None:
    """Lines that are fit for a terminal already."""
    sys.stdout.write(text)
    sys.stdout.flush()


def complain(text: str) -> None:
    sys.stderr.write(f"vhostsync: {printable(text)}\n")


def print_json(value: Any) -> None:
    _show(json.dumps(value) + "\n")


@contextmanager
def _goes_on(what: str) -> Iterator[None]:
    """The backend does what it was told, also if nobody waits for it any more (Ctrl-C): say so."""
    try:
        yield
    except anyio.get_cancelled_exc_class():
        complain(what)
        raise


async def status(client: ControlClient, options: argparse.Namespace) -> int:
    """`vhostsync status`."""
    device = await client.execute("query-status")
    if "receiver" in device:
        if options.json:
            print_json({"status": device})
        else:
            _show(show.receiver_text(device))
        return EXIT_OK
    mirror = await client.execute("query-mirror")
    verify = await client.execute("query-verify")
    if options.json:
        print_json({"status": device, "mirror": mirror, "verify": verify})
    else:
        _show(show.status_text(device, mirror, verify))
    return EXIT_OK


async def stats(client: ControlClient, options: argparse.Namespace) -> int:
    """`vhostsync stats`."""
    result = await client.execute("query-stats")
    if options.json:
        print_json(result)
    else:
        _show(show.stats_text(result))
    return EXIT_OK


async def watch(client: ControlClient, options: argparse.Namespace) -> int:
    """`vhostsync watch`: until the backend ends, or a key is pressed."""
    live = show.Live(sys.stdout)
    ending = False
    try:
        while True:
            mirror = await client.execute("query-mirror")
            if options.json:
                print_json({"mirror": mirror})
            else:
                live.update(show.mirror_line(mirror, live.width))
            until_s = time.monotonic() + options.interval
            while (event := await _next_event(client, until_s)) is not None:
                ending = ending or event["event"] == "SHUTDOWN"
                if options.json:
                    print_json(event)
                elif event["event"] != "MIRROR_PROGRESS":
                    live.say(show.event_text(event))
    except UnreachableError:
        if not ending:
            raise
        return EXIT_OK
    finally:
        if not options.json:
            live.end_line()


async def mirror_start(client: ControlClient, options: argparse.Namespace) -> int:
    """`vhostsync mirror start`, with --wait until the destination is up to date."""
    arguments: dict[str, Any] = {"destination": str(options.destination), "create": options.create}
    if options.cache is not None:
        arguments["cache"] = options.cache
    if options.speed:
        arguments["speed"] = options.speed
    for word in ("full", "force", "fenced"):
        if getattr(options, word):
            arguments[word] = True
    started_s = time.monotonic()
    await client.execute("mirror-start", arguments)
    if not options.wait:
        if options.json:
            print_json(await client.execute("query-mirror"))
        else:
            say(f"Copying to {options.destination}; `vhostsync watch` shows the progress.")
        return EXIT_OK
    live = None if options.json else show.Live(sys.stdout)
    deadline_s = None if options.timeout is None else started_s + options.timeout
    copy_goes_on = "The copy goes on; `vhostsync watch` shows it, `vhostsync mirror cancel` ends it."
    with _goes_on(copy_goes_on):
        try:
            mirror = await _until_steady(client, str(options.destination), deadline_s, live)
        finally:
            if live is not None:
                live.end_line()
    if options.json:
        print_json(mirror)
    if mirror["state"] == "steady":
        if live is not None:
            live.end_line(
                f"{options.destination} is up to date after {show.duration(time.monotonic() - started_s)}."
            )
        return EXIT_OK
    complain(
        f"{options.destination} is not up to date after {show.duration(options.timeout)}; the copy goes on."
    )
    return EXIT_TIMED_OUT


async def _until_steady(
    client: ControlClient, destination: str, deadline_s: float | None, live: show.Live | None
) -> Mapping[str, Any]:
    """The mirror when it is steady, or when the deadline has passed. MirrorError where it will not become
    steady."""
    attached: str | None = None  # as the backend calls it
    while True:
        mirror: Mapping[str, Any] = await client.execute("query-mirror")
        if live is not None:
            live.update(show.mirror_line(mirror, live.width))
        state, now_s = mirror["state"], time.monotonic()
        if state == "degraded":
            why = mirror["last-error"] or mirror["reason"]
            raise MirrorError(f"The mirror to {destination} failed: {why}.")
        attached = attached or mirror["destination"]
        if state == "passthrough" or mirror["destination"] != attached:
            raise MirrorError(f"The mirror to {destination} was ended by another command.")
        if state == "steady" or (deadline_s is not None and now_s >= deadline_s):
            return mirror
        # A change of state ends the wait, so that `steady` is seen at once; a progress event is one more
        # reason to look.
        until_s = now_s + (LOOK_EVERY_TERMINAL_S if live is not None and live.width else LOOK_EVERY_S)
        await _next_event(client, until_s if deadline_s is None else min(until_s, deadline_s))


async def _next_event(client: ControlClient, until_s: float) -> Mapping[str, Any] | None:
    """The next event, None when there was none until `until_s` (time.monotonic)."""
    with anyio.move_on_after(until_s - time.monotonic()):
        return await client.next_event()
    return None


async def mirror_cancel(client: ControlClient, options: argparse.Namespace) -> int:
    """`vhostsync mirror cancel`."""
    await client.execute("mirror-cancel", {"force": options.force})
    return await _done(client, options, "The mirror is cancelled.")


async def mirror_speed(client: ControlClient, options: argparse.Namespace) -> int:
    """`vhostsync mirror speed`."""
    await client.execute("mirror-set-speed", {"speed": options.speed})
    limit = f"limited to {size(options.speed)} a second" if options.speed else "not limited"
    return await _done(client, options, f"The copy is {limit}.")


async def _done(client: ControlClient, options: argparse.Namespace, text: str) -> int:
    if options.json:
        print_json(await client.execute("query-mirror"))
    else:
        say(text)
    return EXIT_OK


async def switch(client: ControlClient, options: argparse.Namespace) -> int:
    """`vhostsync switch`. Exit code 4 where the deadline ended it."""
    arguments = {
        "deadline-ms": round(options.deadline * 1000),
        "max-pause-ms": round(options.max_pause * 1000),
        "keep-mirror": options.keep_mirror,
        "accept-unreadable": options.accept_unreadable,
        "accept-different": options.accept_different,
    }
    began_s = time.monotonic()
    try:
        with (
            _goes_on("The switch goes on; `vhostsync status` says on which disk the guest is."),
            anyio.fail_after(options.deadline + REPLY_GRACE_S),
        ):
            result = await client.execute("switch", arguments)
    except RefusedError as error:
        # No class of QMP's errors says "too late", but a refusal comes at once. The backend may end a try
        # that cannot be in time a little before the deadline.
        if time.monotonic() - began_s < 0.9 * options.deadline:
            raise
        complain(str(error))
        return EXIT_TIMED_OUT
    if options.json:
        print_json(result)
        return EXIT_OK
    tries = result["attempts"]
    say(
        f"The guest runs on {result['source-path']}. It was paused for {result['pause-us'] / 1000:.1f} ms"
        f"{'' if tries == 1 else f', at try {tries}'}."
    )
    if result.get("destination-path"):
        say(f"{result['destination-path']} is its mirror now.")
    for kind, ranges in result.get("accepted", {}).items():
        for each in ranges:
            say(f"Accepted ({kind}): {each['length']} bytes from {each['offset']} on.")
    return EXIT_OK


async def verify(client: ControlClient, options: argparse.Namespace) -> int:
    """`vhostsync verify`; with --wait until it is over: 1 unless the disks are equal (or repaired)."""
    await client.execute("verify", {"repair": options.repair, "speed": options.speed})
    if not options.wait:
        if options.json:
            print_json(await client.execute("query-verify"))
        else:
            say("Comparing the disks; `vhostsync watch` shows the progress.")
        return EXIT_OK
    live = None if options.json else show.Live(sys.stdout)
    with _goes_on("The comparison goes on; `vhostsync status` shows it, `vhostsync verify-cancel` ends it."):
        while (found := await client.execute("query-verify"))["state"] == "running":
            if live is not None:
                live.update(show.verify_line(found, live.width))
            await _next_event(client, time.monotonic() + LOOK_EVERY_S)
    if live is not None:
        live.end_line(show.verify_line(found, None))
    else:
        print_json(found)
    return EXIT_OK if found["state"] in ("equal", "repaired") else EXIT_FAILED


async def verify_cancel(client: ControlClient, options: argparse.Namespace) -> int:
    """`vhostsync verify-cancel`."""
    await client.execute("verify-cancel")
    return await _done(client, options, "The verification is ended.")


async def resize(client: ControlClient, options: argparse.Namespace) -> int:
    """`vhostsync resize`."""
    arguments = {} if options.size is None else {"size": options.size}
    with _goes_on("The disk goes on growing; `vhostsync status` shows its size."):
        result = await client.execute("resize", arguments)
    if options.json:
        print_json(result)
    else:
        say(f"The guest's disk has {size(result['capacity'])} now.")
    return EXIT_OK


async def limit(client: ControlClient, options: argparse.Namespace) -> int:
    """`vhostsync limit`: sets what was given, then shows what holds."""
    given = {kind: rate for kind in KINDS if (rate := getattr(options, kind)) is not None}
    if options.no_limits:
        if given or options.iops_size is not None:
            complain("--none leaves no limit; leave it out, or the others.")
            return EXIT_USAGE
        given = dict.fromkeys(KINDS, NO_LIMIT)
    arguments: dict[str, int] = {}
    for kind, rate in given.items():
        arguments |= {kind: rate.per_s, f"{kind}_max": rate.burst, f"{kind}_max_length": rate.length_s}
    if options.iops_size is not None:
        arguments["iops_size"] = options.iops_size
    if arguments:
        await client.execute("block_set_io_throttle", arguments)
    limits = (await client.execute("query-status")).get("limits")
    if limits is None:
        complain("There is no guest here to limit: this is a receiver, or a backend of an older version.")
        return EXIT_FAILED
    engine = (await client.execute("query-stats"))["engine"]
    if options.json:
        held = {key: engine[key] for key in ("limited-requests", "limited-bytes", "limited-ms")}
        print_json({"limits": limits, **held})
    else:
        _show(show.limits_text(limits, engine))
    return EXIT_OK


async def rededicate(client: ControlClient, options: argparse.Namespace) -> int:
    """`vhostsync rededicate`."""
    await client.execute("rededicate")
    if options.json:
        print_json(await client.execute("query-status"))
    else:
        say("The disk has no owner any more; whoever attaches it next has it.")
    return EXIT_OK


async def quit_backend(client: ControlClient, options: argparse.Namespace) -> int:
    """`vhostsync quit`: returns when the backend is over, and its disks are free."""
    with _goes_on("The backend goes on ending."), anyio.fail_after(options.timeout):
        await client.execute_to_the_end("quit", {"force": options.force})
    if options.json:
        print_json({})
    return EXIT_OK
