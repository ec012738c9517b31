# SPDX-License-Identifier: Apache-2.0
"""`./run demo --two-hosts`: a running guest's disk is kept in step on a second host. The first host dies,
and the guest is started again on the second, from its disk there.

The hosts are two network namespaces with a cable between them, which need root. All else is real."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.guest.assets import AssetError, GuestAssets, guest_assets
from tests.guest.backends import Vhostsync
from tests.guest.harness import Guest, GuestDisk, Load, Report, machine_command, verify_blocks
from tests.guest.images import check_clean, file_of_crashed_ext4, file_of_ext4
from tests.guest.story import (
    LOAD_BLOCKS,
    Screen,
    check_log,
    make_source,
    show_counts,
    tell,
    vhostsync,
)
from tests.network.receivers import Authority, Receiving

STEPS = 8
PORT = 7070


@dataclass(frozen=True)
class Host:
    """A network namespace: a network card and an address of its own."""

    name: str
    address: str
    folder: Path

    @property
    def prefix(self) -> tuple[str, ...]:
        """Before a command that runs there."""
        return ("ip", "netns", "exec", self.name)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssetError(f"no network namespaces for two hosts: `ip {' '.join(words)}` says {done.stderr}")


@contextlib.contextmanager
def two_hosts(work: Path) -> Iterator[tuple[Host, Host]]:
    name = f"vhs-{os.getpid()}"
    made = [
        Host(f"{name}-{letter}", f"10.77.0.{number}", work / f"host-{letter}")
        for number, letter in ((1, "a"), (2, "b"))
    ]
    try:
        for host in made:
            host.folder.mkdir()
            _ip("netns", "add", host.name)
        first, second = made
        cable = ("type", "veth", "peer", "name", "eth0", "netns", second.name)
        _ip("-n", first.name, "link", "add", "eth0", *cable)
        for host in made:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", host.name, "link", "set", link, "up")
        yield first, second
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


def run_until_it_dies(
    screen: Screen, assets: GuestAssets, host: Host, source: Path, to: str
) -> tuple[Load, Report]:
    """Steps 4 to 6, on the first host; the last report that the guest had made."""
    screen.step("On the first host: a Linux guest that writes and syncs all the time")
    screen.command("vhostsync serve --socket-path disk.sock --blk-file source.img")
    with Vhostsync(host.folder, source, queues=2, prefix=host.prefix) as backend, Guest(
        assets, host.folder, machine_command([GuestDisk(backend.socket, queues=2)])
    ) as guest:
        guest.run("mount -t ext4 /dev/vda /mnt")
        guest.run("echo 'written on the first host' >/mnt/early.txt && sync")
        load = guest.start_load("/mnt/load.bin", blocks=LOAD_BLOCKS)
        screen.good(f"Linux {guest.run('uname -r')} is up; {load.next_report().synced:,} writes synced")

        screen.step(
            "Mirror it to the second host",
            "Certificates of both sides, then a key for this generation alone. Once steady, a sync of "
            "the guest is confirmed only when the second host holds it durably.",
        )
        vhostsync(screen, backend.control, "mirror", "start", to, "--create", "--wait")
        show_counts(screen, backend, load)

        screen.step(
            "The first host dies",
            "Its guest and its backend are killed where they stand; nothing is flushed.",
        )
        load.fresh_report()
        backend.process.kill()
        guest.process.kill()
        load.drain()
        last = load.latest_report()
        screen.good(f"the last that the guest was told: {last.synced:,} writes are synced")
    return load, last


def go_on(screen: Screen, assets: GuestAssets, host: Host, standby: Path) -> None:
    """The same guest's disk, on the second host."""
    with Vhostsync(host.folder, standby, queues=2, prefix=host.prefix) as backend:
        with Guest(
            assets, host.folder, machine_command([GuestDisk(backend.socket, queues=2)])
        ) as guest:
            guest.run("mount -t ext4 /dev/vda /mnt")
            said = guest.run("cat /mnt/early.txt")
            guest.run("echo 'written on the second host' >/mnt/late.txt && sync")
            check_log(guest)
            guest.power_off()
        backend.stop()
    check_clean(standby)
    screen.good(f"it reads \"{said}\", writes, and leaves a clean file system")


def story(screen: Screen, work: Path) -> None:
    for program, package in (("certtool", "gnutls-bin"), ("qemu-nbd", "qemu-utils"), ("ip", "iproute2")):
        if shutil.which(program) is None:
            raise AssetError(f"this demo needs {program} (the package {package})")
    assets = guest_assets()
    screen.step("Make two hosts, and certificates for both", "Network namespaces with a cable between them.")
    with two_hosts(work) as (first, second):
        authority = Authority(work / "authority")
        ours = authority.issue(first.folder / "pki", "client", names=[first.address])
        theirs = authority.issue(second.folder / "pki", "server", names=[second.address])
        screen.good(f"{first.address} and {second.address}")
        screen.step("On the first host: the guest's disk")
        source = make_source(screen, first.folder)
        screen.step("On the second host: wait for a disk")
        screen.command(
            f"vhostsync receive --blk-file standby.img --create --listen {second.address}:{PORT} "
            "--tls-certificates /etc/pki/vhostsync"
        )
        standby = second.folder / "standby.img"
        with Receiving(
            second.folder, standby, theirs, "--create", host=second.address, port=PORT, before=second.prefix
        ) as receiving:
            screen.good(f"process {receiving.process.pid} listens")
            to = f"receive://{second.address}:{PORT}?tls-certificates={ours}"
            load, last = run_until_it_dies(screen, assets, first, source, to)

            screen.step("On the second host: look what is there")
            receiving.stop()
        found = file_of_crashed_ext4(standby, "load.bin", work)
        verify_blocks(assets, found, load, synced=last.synced)
        screen.good(f"standby.img: all {last.synced:,} synced writes are there")
        early = file_of_crashed_ext4(standby, "early.txt", work).read_text().strip()
        screen.good(f"early.txt: \"{early}\"")
        screen.step("Start the guest again, on the second host")
        screen.command("vhostsync serve --socket-path disk.sock --blk-file standby.img")
        go_on(screen, assets, second, standby)
        if file_of_ext4(standby, "late.txt", work).read_text() != "written on the second host\n":
            raise AssetError("late.txt is not on standby.img")
    screen.title("What you have seen")
    screen.paragraph(
        "A virtual machine wrote to its disk at the speed of its own host. Its disk was kept in step on "
        "another host, encrypted, by one command on each. When the first host died, all that the machine had "
        "synced was on the second, and the machine was started there."
    )
    print(f"\nIt took {screen.seconds:.0f} s. Next: docs/network.md.")


if __name__ == "__main__":
    raise SystemExit(tell(STEPS, story))
