# SPDX-License-Identifier: Apache-2.0
"""What the demos share: how they tell their story, the guest's disk, the commands that a user would type."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from tests.guest.assets import AssetError
from tests.guest.backends import Vhostsync, vhostsync_command
from tests.guest.harness import Guest, GuestError, Load
from tests.guest.images import ImageError, fill_random, make_ext4, new_image
from tests.guest.processes import ProcessError
from tests.guest.qmp_client import QmpError
from tests.sizes import MIB

DISK_MIB = 1024
PHOTOS_MIB = 256
LOAD_MIB = 64
LOAD_BLOCKS = LOAD_MIB * MIB // 4096

Counts = dict[str, Any]


class Screen:
    """Numbered steps, the commands a user would type, and what they print."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._step = 0
        self._started = time.monotonic()

    def _style(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    def step(self, title: str, why: str = "") -> None:
        self._step += 1
        print("\n" + self._style("1;36", f"[{self._step}/{self._steps}] {title}"))
        for line in textwrap.wrap(why, 92):
            print(self._style("2", f"      {line}"))
        sys.stdout.flush()

    def say(self, text: str) -> None:
        print(f"      {text}", flush=True)

    def good(self, text: str) -> None:
        print("  " + self._style("1;32", "ok") + f"  {text}", flush=True)

    def command(self, *words: str) -> None:
        print("      " + self._style("1", "$ " + " ".join(words)), flush=True)

    def title(self, text: str) -> None:
        print("\n" + self._style("1", text), flush=True)

    def bad(self, text: str) -> None:
        print("\n" + self._style("1;31", "The demo failed: ") + text, file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started


    def paragraph(self, text: str) -> None:
        print(textwrap.fill(text, 98))


def vhostsync(screen: Screen, control: Path, *words: str) -> None:
    """Run a vhostsync command as a user would, its output on the user's own terminal."""
    screen.command("vhostsync", *words)
    done = subprocess.run([*vhostsync_command(), "--control", str(control), *words], check=False)
    if done.returncode != 0:
        raise ProcessError(f"`vhostsync {' '.join(words)}` ended with {done.returncode}")


def make_source(screen: Screen, work: Path) -> Path:
    """The guest's disk, with a file system and data on it."""
    contents = work / "contents"
    contents.mkdir()
    for name, mib in (("photos.bin", PHOTOS_MIB), ("load.bin", LOAD_MIB)):
        fill_random(new_image(contents / name, mib), 0, mib * MIB)
    source = new_image(work / "source.img", DISK_MIB)
    make_ext4(source, contents)
    shutil.rmtree(contents)
    screen.say(f"{source.name}       1 GiB, ext4, {PHOTOS_MIB + LOAD_MIB} MiB of files on it")
    return source


def check_log(guest: Guest) -> None:
    """GuestError when the guest's kernel has seen its disk fail."""
    if trouble := guest.io_trouble():
        raise GuestError("the guest's kernel log tells of trouble:\n" + "\n".join(trouble))


def show_counts(screen: Screen, backend: Vhostsync, load: Load) -> None:
    """The five counts after each of some syncs of the guest."""
    load.drain()
    screen.say("")
    screen.say("          source              |         destination          |  guest")
    screen.say("  writes done     of these    |  writes held    of these     |  last sync")
    screen.say("                  durable     |                 durable      |  covers")
    for _ in range(6):
        load.next_report()
        counts: Counts = backend.status()["counts"]
        done, safe = counts["source-generation"], counts["source-flushed"]
        held, held_safe = counts["writes-mirrored"], counts["writes-flushed"]
        row = f"  {done:>11,}  {safe:>11,}    |  {held:>11,}  {held_safe:>11,}    |"
        screen.say(f"{row}  {counts['flush-request']:>9,}")
    screen.say("")


def switch(screen: Screen, backend: Vhostsync) -> float:
    """Have a user move the guest to the destination; the pause in milliseconds, from the event about it."""
    assert backend.status()["state"] == "steady"  # and from here on events are heard
    vhostsync(screen, backend.control, "switch")
    data = backend.qmp.wait_event("SWITCH_COMPLETED", 10)
    return float(data["pause-us"]) / 1000


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """A folder for the two disks, gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="vhs-demo-", dir="/var/tmp"))
    try:
        if shutil.disk_usage(folder).free < 3 * DISK_MIB * MIB:
            raise ImageError("/var/tmp has less than the 3 GiB free that the demo needs")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tell(steps: int, story: Callable[[Screen, Path], None]) -> int:
    """Tell it in a folder of its own; the exit code."""

    def terminated(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminated)  # so that the guest and the folder go, too
    screen = Screen(steps)
    try:
        with work_folder() as work:
            story(screen, work)
    except (AssetError, GuestError, ImageError, ProcessError, QmpError, OSError) as error:
        screen.bad(str(error))
        return 1
    except KeyboardInterrupt:
        screen.bad("interrupted")
        return 130
    return 0
