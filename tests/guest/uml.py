# SPDX-License-Identifier: Apache-2.0
"""Linux's user-mode kernel as a guest: a second vhost-user frontend (virtio_uml), without QEMU.

Debian packages it as user-mode-linux. It runs one script from a folder of the host and powers off; two to
three seconds in all.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.guest.assets import GuestAssets
from tests.guest.processes import Process, ProcessError

KERNEL = "linux.uml"
MODULES = Path("/usr/lib/uml/modules")

_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do insmod $module; done
echo "@@OUTPUT"
(set -e
%s
)
echo "@@STATUS $?"
echo "@@DMESG"
dmesg
sync
poweroff -f
"""


def uml_missing() -> str | None:
    """Why there is no user-mode guest on this machine; None when there is one."""
    if shutil.which(KERNEL) is None:
        return "there is no linux.uml (Debian's package user-mode-linux)"
    if not list(MODULES.rglob("virtio_blk.ko*")):
        return "the user-mode kernel's virtio_blk module is not there"
    return None


def run_uml(
    assets: GuestAssets, folder: Path, sockets: Sequence[Path], script: str, *, timeout_s: float = 60.0
) -> tuple[str, str]:
    """Boot with these vhost-user disks (/dev/vda, /dev/vdb …), run shell lines, power off.

    Returns what the lines printed, and the kernel's log.
    Raises ProcessError when a line fails or the guest does not come to an end in time.
    """
    root = folder / "uml"
    for name in ("bin", "dev", "proc", "sys", "tmp", "mnt", "modules"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for program, target in ((assets.busybox, "busybox"), (assets.vhs_load, "vhs-load")):
        shutil.copy(program, root / "bin" / target)
        (root / "bin" / target).chmod(0o755)
    shutil.copy(virtio_module(), root / "modules")
    (root / "init").write_text(_INIT % script)
    (root / "init").chmod(0o755)

    log = folder / "uml.log"
    with start_uml(assets, folder, root, Path("/init"), words_of(sockets), log) as process:
        process.wait(timeout_s)
    output = log.read_text(errors="replace").replace("\r\n", "\n")
    before, status, after = output.partition("@@STATUS ")
    if not status or not after.startswith("0\n"):
        raise ProcessError(f"the user-mode guest's script failed:\n{output[-3000:]}")
    return before.partition("@@OUTPUT\n")[2], after.partition("@@DMESG\n")[2]


def virtio_module() -> Path:
    return next(MODULES.rglob("virtio_blk.ko*"))


def words_of(sockets: Sequence[Path]) -> list[str]:
    """For vhost-user disks."""
    return [f"virtio_uml.device={socket}:2" for socket in sockets]  # 2: virtio's number of a block device


def start_uml(
    assets: GuestAssets, folder: Path, root: Path, init: Path, devices: Sequence[str], log: Path
) -> Process:
    """A guest whose files are those below `root`, which it only may write to where that is in `folder`."""
    launch: list[str | Path] = []
    avoid = []
    if " amx_tile" in Path("/proc/cpuinfo").read_text():
        # See uml-launch.c. The kernel hands words that it does not know to init, as environment.
        launch = [assets.uml_launch]
        features = "-AVX2,-AVX512F,-AVX512VL,-AVX512BW,-AVX_Fast_Unaligned_Load"
        avoid = [f"GLIBC_TUNABLES=glibc.cpu.hwcaps={features}"]
    command = [
        *launch,
        KERNEL, "mem=128M", "rootfstype=hostfs", f"rootflags={root}",
        "rw" if root.is_relative_to(folder) else "ro", f"init={init}",
        "con=null", "con0=null,fd:1", "ssl=null", "loglevel=1", *avoid, *devices,
    ]  # fmt: skip
    return Process("the user-mode guest", command, log, env={"TMPDIR": str(folder)})
