# SPDX-License-Identifier: Apache-2.0
"""A real Linux guest under QEMU, driven command by command.

The guest's kernel and a busybox initramfs boot in two to three seconds under TCG. Inside, two small agents
(guest-agent.sh) each serve one serial port: `guest.run` uses the first, a load that runs beside it the
second. Whoever waits here waits for a line from the guest, never for time to pass.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.guest.assets import GuestAssets
from tests.guest.processes import Process, wait_listening
from tests.guest.qmp_client import Qmp

# What a kernel says when a disk lets it down.
IO_TROUBLE = re.compile(
    r"I/O error|Buffer I/O|EXT4-fs (error|warning)|JBD2:.*(error|abort)|blk_update_request|critical \w+ error"
    r"|blocked for more than|Kernel panic|Oops:",
    re.IGNORECASE,
)


# A guest that takes longer has hung: on a machine whose processors others want, everything takes many times
# as long as it should. A test's own time limit may come first.
ANSWER_S = 180.0
# loglevel=5: the console, a port of an emulated machine, gets warnings and worse; `dmesg` has all.
# init_on_alloc=0: only the backend writes what is read from the disk, and so a migration without its dirty
# log shows. no_timer_check: on a busy host the kernel may see no tick while it looks for one, and panic.
KERNEL_OPTIONS = (
    "console=ttyS0 loglevel=5 panic=-1 mitigations=off nokaslr nowatchdog init_on_alloc=0 no_timer_check"
)


class GuestError(Exception):
    """The guest did not do what was asked; the message holds what it said."""


@dataclass(frozen=True)
class Result:
    """What a command in the guest printed (standard error included) and its exit status."""

    output: str
    status: int


class Channel:
    """One serial port with an agent behind it: a thread collects its lines, so the guest never waits for
    the test."""

    def __init__(self, path: Path) -> None:
        self._socket = _connected(path)
        self._next: socket.socket | None = None  # where the port goes on when this socket has ended
        self._lines: list[str] = []
        self._taken = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._collect, name=f"channel {path.name}", daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        pending = b""
        while True:
            try:
                while data := self._socket.recv(65536):
                    *complete, pending = (pending + data).split(b"\n")
                    with self._changed:
                        self._lines += [line.decode(errors="replace") for line in complete]
                        self._changed.notify_all()
            except OSError:
                pass  # closed under us: the guest is gone
            with self._changed:
                if self._next is None:
                    self._closed = True
                    self._changed.notify_all()
                    return
                self._socket.close()
                self._socket, self._next = self._next, None
                self._changed.notify_all()

    def continue_at(self, path: Path) -> None:
        """What the guest says after the present socket's end comes from this one: a line may begin on the one
        and end on the other."""
        successor = _connected(path)
        with self._changed:
            assert self._next is None and not self._closed
            self._next = successor

    def stay(self) -> None:
        """Take `continue_at` back."""
        with self._changed:
            if self._next is not None:
                self._next.close()
                self._next = None

    def wait_moved(self, timeout_s: float = 30.0) -> None:
        """Returns when the port has gone on to the socket of `continue_at`: what is sent now goes there."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._next is None or self._closed, timeout_s):
                raise TimeoutError("the guest's port has not moved")

    def send(self, line: str) -> None:
        self._socket.sendall(line.encode() + b"\n")

    def next_line(self, deadline: float) -> str | None:
        """The next line, None when the port is closed; raises TimeoutError at the deadline (monotonic
        seconds)."""
        with self._changed:
            while self._taken == len(self._lines):
                if self._closed:
                    return None
                if (
                    not self._changed.wait(max(deadline - time.monotonic(), 0))
                    and time.monotonic() >= deadline
                ):
                    raise TimeoutError
            self._taken += 1
            return self._lines[self._taken - 1]

    def waiting(self) -> bool:
        """Whether `next_line` would return at once."""
        with self._changed:
            return self._taken < len(self._lines)

    def close(self) -> None:
        self.stay()
        with contextlib.suppress(OSError):  # the other side may have been quicker
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()


def _connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


class Job:
    """One command under way on a channel."""

    def __init__(self, guest: Guest, channel: Channel, number: int, command: str) -> None:
        assert "\n" not in command, "the agent reads one line a command"
        self._guest = guest
        self._channel = channel
        self._done = re.compile(rf"@@DONE {number} (\d+)")
        self._command = command
        self.lines: list[str] = []
        self.result: Result | None = None
        channel.send(f"{number} {command}")

    def _advance(self, deadline: float) -> str | None:
        """The next line of output; None once the command is over."""
        if self.result is not None:
            return None
        try:
            line = self._channel.next_line(deadline)
        except TimeoutError:
            raise self._guest.failure(
                f"the guest has not finished `{self._command}`: {self.lines[-5:]}"
            ) from None
        if line is None:
            raise self._guest.failure(f"the guest went away during `{self._command}`")
        done = self._done.fullmatch(line)
        if done is None:
            self.lines.append(line)
            return line
        # The agent ends the output with a line break of its own: drop the empty line that it makes.
        if self.lines and self.lines[-1] == "":
            self.lines.pop()
        self.result = Result("\n".join(self.lines), int(done[1]))
        return None

    def wait_line(self, accept: Callable[[str], bool], timeout_s: float = ANSWER_S) -> str:
        """The next line that is accepted. Raises GuestError when the command ends or the time is up first."""
        deadline = time.monotonic() + timeout_s
        while (line := self._advance(deadline)) is not None:
            if accept(line):
                return line
        raise self._guest.failure(f"`{self._command}` ended too early: {self.lines[-5:]}")

    def collect(self) -> None:
        """Take the output that has arrived already, without waiting."""
        while self.result is None and self._channel.waiting() and self._advance(time.monotonic()) is not None:
            pass

    def wait(self, timeout_s: float = ANSWER_S) -> Result:
        deadline = time.monotonic() + timeout_s
        while self._advance(deadline) is not None:
            pass
        assert self.result is not None
        return self.result


@dataclass(frozen=True)
class Report:
    """One line of vhs-load: all generations to `synced` are durable; none above `issued` was submitted
    yet."""

    synced: int
    issued: int
    slowest_ms: float


class Load:
    """vhs-load running in the guest, and what it reported last."""

    def __init__(self, job: Job, options: str) -> None:
        self._job = job
        self.options = options  # what a verifier must be told to know the same blocks

    def next_report(self, timeout_s: float = ANSWER_S) -> Report:
        """Wait for the next report, that is: for a sync that ended after this call or is unread."""
        return _report(self._job.wait_line(lambda line: line.startswith("synced="), timeout_s))

    def fresh_report(self, timeout_s: float = ANSWER_S) -> Report:
        """A report about a sync that began after this call.

        What has arrived already is passed over, and one more report too: its sync may have begun before the
        call."""
        self.drain()
        self.next_report(timeout_s)
        return self.next_report(timeout_s)

    def latest_report(self) -> Report:
        """The last one that has arrived; there has to be one."""
        self.drain()
        return _report(next(line for line in reversed(self._job.lines) if line.startswith("synced=")))

    def drain(self) -> None:
        """Pass over all that has arrived already."""
        self._job.collect()

    def finish(self, timeout_s: float = ANSWER_S) -> Report:
        """Wait for the end (see `Guest.stop_load`); the report about the last sync."""
        result = self._job.wait(timeout_s)
        reports = [line for line in self._job.lines if line.startswith("synced=")]
        if result.status != 0 or not result.output.splitlines()[-1].startswith("done "):
            raise GuestError(f"the load failed with {result.status}: {result.output[-500:]}")
        return _report(reports[-1])

    def reports(self) -> int:
        """How many there were so far: one for each sync."""
        return sum(line.startswith("synced=") for line in self._job.lines)

    def slowest_ms(self) -> float:
        """The longest write of all that was reported so far."""
        return max(
            (_report(line).slowest_ms for line in self._job.lines if line.startswith("synced=")), default=0.0
        )


def _report(line: str) -> Report:
    values = dict(word.split("=") for word in line.split())
    return Report(int(values["synced"]), int(values["issued"]), int(values["slowest_us"]) / 1000)


@dataclass(frozen=True)
class GuestOptions:
    """The virtual machine around the disks."""

    qemu: tuple[str, ...] = ("qemu-system-x86_64",)
    machine: str = "q35"
    memory_mib: int = 256
    cpus: int = 2


@dataclass(frozen=True)
class GuestDisk:
    """One vhost-user disk: the backend's socket and what QEMU is told about it."""

    socket: Path
    queues: int = 1
    queue_size: int | None = None
    chardev: str = ""  # more of -chardev, as in "reconnect=1"
    properties: str = ""  # more of -device, as in "discard=off"


def machine_command(disks: Sequence[GuestDisk], options: GuestOptions = GuestOptions()) -> list[str]:
    """QEMU's arguments for a machine with these disks; guest memory is a shared memfd, as vhost-user
    needs."""
    command = [
        *options.qemu,
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        # TCG always: it works everywhere, and KVM inside a virtual machine is not to be relied on.
        "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(options.cpus),
        "-object", f"memory-backend-memfd,id=memory,size={options.memory_mib}M,share=on",
        "-machine", f"{options.machine},memory-backend=memory", "-m", f"{options.memory_mib}M",
    ]  # fmt: skip
    for index, disk in enumerate(disks):
        socket = f",{disk.chardev}" if disk.chardev else ""
        size = f",queue-size={disk.queue_size}" if disk.queue_size is not None else ""
        more = f",{disk.properties}" if disk.properties else ""
        queues = f",num-queues={disk.queues}{size}"
        command += ["-chardev", f"socket,id=backend{index},path={disk.socket}{socket}"]
        command += ["-device", f"vhost-user-blk-pci,id=disk{index},chardev=backend{index}{queues}{more}"]
    return command


@dataclass(frozen=True)
class Qemu:
    """A QEMU process, its monitor, and where the guest's console and its agents' ports are."""

    process: Process
    monitor: Path
    console: Path
    ports: tuple[Path, ...]


class Guest:
    """A running guest. Use it in a `with`: leaving that ends QEMU, whatever happened."""

    def __init__(
        self, assets: GuestAssets, folder: Path, machine: Sequence[str], *, name: str = "guest"
    ) -> None:
        """Boot. `machine` is all about the virtual machine (machine_command, or a script of qemu-configs);
        kernel, serial ports and the monitor are added here."""
        self._assets = assets
        self._folder = folder
        self._numbers = itertools.count(1)
        self._channels: list[Channel] = []
        self.qemu = self.launch(machine, name)
        try:
            for port in self.qemu.ports:
                wait_listening(self.process, port)
                self._channels.append(Channel(port))
            for channel in self._channels:
                self._wait_ready(channel)
        except BaseException:
            self.kill()
            raise

    def launch(self, machine: Sequence[str], name: str, *more: str) -> Qemu:
        """Start a QEMU that could run this guest; `name` is that of its files. The caller ends it, or makes
        it the guest's."""
        ports = tuple(self._folder / f"{name}.agent{index}" for index in (1, 2))
        console, monitor = self._folder / f"{name}.console", self._folder / f"{name}.qmp"
        command = [
            *machine,
            "-kernel", str(self._assets.kernel), "-initrd", str(self._assets.initramfs),
            "-append", KERNEL_OPTIONS,
            "-qmp", f"unix:{monitor},server=on,wait=off",
            "-serial", f"file:{console}",
            *more,
        ]  # fmt: skip
        for index, port in enumerate(ports):
            command += [
                "-chardev",
                f"socket,id=agent{index},path={port},server=on,wait=off",
                "-serial",
                f"chardev:agent{index}",
            ]
        return Qemu(Process("QEMU", command, self._folder / f"{name}.log"), monitor, console, ports)

    @property
    def process(self) -> Process:
        """The QEMU that runs the guest."""
        return self.qemu.process

    def expect_at(self, qemu: Qemu) -> None:
        """The guest may go on in that process, which waits for it: listen to its ports, too."""
        for channel, port in zip(self._channels, qemu.ports, strict=True):
            channel.continue_at(port)

    def stay(self) -> None:
        """Take `expect_at` back: the guest has not moved."""
        for channel in self._channels:
            channel.stay()

    def moved_to(self, qemu: Qemu) -> None:
        """The guest runs in that process now; end the one that it has left. Jobs and loads go on."""
        self.qemu.process.kill()
        self.qemu = qemu
        for channel in self._channels:
            channel.wait_moved()

    def _wait_ready(self, channel: Channel, timeout_s: float = ANSWER_S) -> None:
        deadline = time.monotonic() + timeout_s
        try:
            while (line := channel.next_line(deadline)) != "@@READY":
                if line is None:
                    raise self.failure("QEMU ended before the guest was up")
        except TimeoutError:
            raise self.failure(f"the guest is not up after {timeout_s:g} s") from None

    def failure(self, what: str) -> GuestError:
        """An error with what QEMU and the guest's console said last."""
        said = self.qemu.console
        console = said.read_text(errors="replace").splitlines()[-15:] if said.exists() else []
        return GuestError(
            "\n".join([what, "--- QEMU:", self.process.last_output(10), "--- console:", *console])
        )

    def run(self, command: str, *, timeout_s: float = ANSWER_S, check: bool = True) -> str:
        """Run a shell command in the guest and return its output; raises GuestError when it fails."""
        result = self.start(command, channel=0).wait(timeout_s)
        if check and result.status != 0:
            raise self.failure(f"`{command}` ended with {result.status} in the guest: {result.output}")
        return result.output

    def start(self, command: str, *, channel: int = 1) -> Job:
        """Start a command on the second channel, beside what `run` does on the first."""
        return Job(self, self._channels[channel], next(self._numbers), command)

    def start_load(
        self, target: str, *, blocks: int, threads: int = 4, seed: int = 1, more: str = ""
    ) -> Load:
        """Start vhs-load on a device or file of the guest."""
        options = f"--blocks {blocks} --threads {threads} --seed {seed}"
        return Load(self.start(f"exec vhs-load write {target} {options} {more}"), options)

    def stop_load(self, load: Load) -> Report:
        """Have the load end with a last sync; returns the report about that."""
        self.run("killall vhs-load")
        return load.finish()

    def qmp(self) -> Qmp:
        """A connection to QEMU's monitor, for the caller to close."""
        return Qmp(self.qemu.monitor)

    def io_trouble(self) -> list[str]:
        """Lines of the guest's kernel log that tell of a failed or hanging disk."""
        return [line for line in self.run("dmesg").splitlines() if IO_TROUBLE.search(line)]

    def power_off(self, timeout_s: float = ANSWER_S) -> None:
        """Shut down cleanly: file systems unmounted, caches flushed, power off; returns when QEMU is gone."""
        self.run("umount -a 2>/dev/null; sync", check=False)
        self._channels[0].send("0 poweroff -f")
        code = self.process.wait(timeout_s)
        self._close()
        if code != 0:
            raise self.failure(f"QEMU ended with {code}")

    def kill(self) -> None:
        """Pull the plug: QEMU is killed. Harmless when it is over."""
        self.process.kill()
        self._close()

    def _close(self) -> None:
        while self._channels:
            self._channels.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def rings_are_packed(guest: Guest) -> bool:
    """Whether the guest's driver has negotiated VIRTIO_F_RING_PACKED for its first disk."""
    return guest.run("cat /sys/block/vda/device/features").strip()[34] == "1"


def verify_blocks(assets: GuestAssets, image: Path, load: Load, *, synced: int, issued: int = 0) -> str:
    """Check an image (or a file) on the host: every block at least as new as what was synced, none from
    after `issued` (0: no such bound). Returns vhs-load's summary; raises GuestError with the first bad
    blocks."""
    command = [
        str(assets.vhs_load),
        "verify",
        str(image),
        *load.options.split(),
        "--synced",
        str(synced),
        "--issued",
        str(issued),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GuestError(f"{image.name} does not hold what the guest wrote: {done.stdout}{done.stderr}")
    return done.stdout.strip()
