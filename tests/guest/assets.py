# SPDX-License-Identifier: Apache-2.0
"""What a guest is made of: kernel, busybox, the writer `vhs-load`, and the initramfs that holds them.

Everything is unpacked from the distribution's own packages into a cache folder; nothing is installed. The
pieces are made once and used again until their inputs change. `python3 -m tests.guest.assets` makes them
ahead of the tests."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Modules that the guest needs, in no order; what a kernel has built in, or does not have at all, is left out.
MODULES = ("virtio_pci", "virtio_blk", "ext4", "crc32c_generic")

# The kernel comes from the first of these meta packages that the distribution has. Debian's cloud kernel is
# small and has what a virtual machine needs; Ubuntu's nearest is the one for virtual machines.
KERNEL_META_PACKAGES = (
    "linux-image-cloud-amd64",
    "linux-image-virtual",
    "linux-image-amd64",
    "linux-image-generic",
)


class AssetError(Exception):
    """A piece of the guest cannot be made; the message says which, and what to do."""


@dataclass(frozen=True)
class GuestAssets:
    """Paths of the finished pieces, all inside the cache folder."""

    kernel: Path
    initramfs: Path
    busybox: Path
    vhs_load: Path
    uml_launch: Path


def cache_folder() -> Path:
    """The project's cache folder: VHOSTSYNC_CACHE, else the user's cache home. Created if it is missing."""
    named = os.environ.get("VHOSTSYNC_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(named) if named else home / "vhostsync"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a program and return what it printed; raises AssetError with its last words when it fails."""
    try:
        done = subprocess.run(
            [str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise AssetError(
            f"{command[0]} is not installed; `./run test` installs what the tests need"
        ) from None
    if done.returncode != 0:
        raise AssetError(
            f"{' '.join(map(str, command))} failed: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout


def unpack_package(package: str, into: Path) -> None:
    """Download one package and unpack its files into a folder. The system's package database does not
    change."""
    with tempfile.TemporaryDirectory(prefix="vhostsync-deb-") as folder:
        try:
            run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package, cwd=Path(folder))
        except AssetError as error:
            raise AssetError(
                f"cannot download the package {package} (is the network up?): {error}"
            ) from error
        for archive in Path(folder).glob("*.deb"):
            into.mkdir(parents=True, exist_ok=True)
            run("dpkg-deb", "-x", archive, into)


def kernel_packages() -> list[str]:
    """The real packages (image and modules) behind the first kernel meta package that the distribution
    has."""
    for meta in KERNEL_META_PACKAGES:
        try:
            depends = run("apt-cache", "depends", "--no-recommends", "--no-suggests", meta)
        except AssetError:
            continue
        images = re.findall(r"Depends: (linux-image-[0-9]\S+)", depends)
        if not images:
            # Debian's unsigned twin or a meta package of a meta package: nothing to unpack here.
            continue
        modules = [image.replace("linux-image-", "linux-modules-") for image in images[:1]]
        return images[:1] + [name for name in modules if package_known(name)]
    raise AssetError(
        f"no guest kernel: the package lists have none of {', '.join(KERNEL_META_PACKAGES)}; "
        "run `apt-get update` and try again"
    )


def package_known(name: str) -> bool:
    try:
        return bool(run("apt-cache", "show", "--no-all-versions", name).strip())
    except AssetError:
        return False


def module_bytes(path: Path) -> bytes:
    """A kernel module's ELF bytes, whatever the distribution compressed it with."""
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq", str(path)], check=True, capture_output=True).stdout
    return path.read_bytes()


def load_order(modules_folder: Path, wanted: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """Each wanted module with all it depends on, dependencies first: (name, ELF bytes).

    Packages ship no modules.dep (depmod makes it at installation), so dependencies are read from the modules.
    """
    found = {path.name.split(".ko")[0].replace("-", "_"): path for path in modules_folder.rglob("*.ko*")}
    order: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in order or name not in found:
            return
        content = module_bytes(found[name])
        depends = re.search(rb"\0depends=([^\0]*)\0", content)
        for other in depends[1].decode().split(",") if depends else []:
            if other:
                add(other.replace("-", "_"))
        order[name] = content

    for name in wanted:
        add(name)
    return list(order.items())


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def compile_tool(cache: Path, name: str) -> Path:
    """Compile one of the C programs here, static, so that it runs in any guest and on the host."""
    source = HERE / f"{name}.c"
    program = cache / f"{name}-{digest(source.read_bytes())}"
    if not program.exists():
        partial = program.with_suffix(".partial")
        flags = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread")
        run("cc", *flags, "-o", partial, source)
        partial.rename(program)
    return program


def fetch_busybox(cache: Path) -> Path:
    program = cache / "busybox"
    if not program.exists():
        with tempfile.TemporaryDirectory(prefix="vhostsync-busybox-") as folder:
            unpack_package("busybox-static", Path(folder))
            inside = next(
                path for path in Path(folder).rglob("busybox") if path.is_file() and path.parent.name == "bin"
            )
            partial = program.with_suffix(".partial")
            shutil.copy(inside, partial)
            partial.rename(program)
    return program


def fetch_prometheus(cache: Path, name: str = "prometheus") -> Path:
    """The server, or `promtool`, its checker: the machine's own, else unpacked here. Its package is not
    installed: that would start a server."""
    if (installed := shutil.which(name)) is not None:
        return Path(installed)
    program = cache / name
    if not program.exists():
        with tempfile.TemporaryDirectory(prefix="vhostsync-prometheus-", dir=cache) as folder:
            unpack_package("prometheus", Path(folder))
            for each in ("prometheus", "promtool"):
                (Path(folder) / "usr/bin" / each).rename(cache / each)
    return program


def fetch_kernel(cache: Path) -> Path:
    """Unpack the guest's kernel; returns a folder with `vmlinuz` and `modules/NN-name.ko` in load order."""
    packages = kernel_packages()
    folder = cache / f"kernel-{packages[0]}"
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(prefix="vhostsync-kernel-", dir=cache) as scratch:
        tree, result = Path(scratch) / "tree", Path(scratch) / "result"
        (result / "modules").mkdir(parents=True)
        for package in packages:
            unpack_package(package, tree)
        images = list(tree.glob("boot/vmlinuz-*")) + list(tree.glob("usr/lib/modules/*/vmlinuz"))
        if not images:
            raise AssetError(f"the package {packages[0]} holds no kernel image")
        shutil.copy(images[0], result / "vmlinuz")
        (result / "vmlinuz").chmod(0o644)
        for index, (name, content) in enumerate(load_order(tree, MODULES)):
            (result / "modules" / f"{index:02d}-{name}.ko").write_bytes(content)
        result.rename(folder)
    return folder


def build_initramfs(cache: Path, kernel_folder: Path, busybox: Path, vhs_load: Path) -> Path:
    """Pack kernel modules, busybox, the writer and the two scripts of the guest into one archive."""
    scripts = {"init": HERE / "guest-init.sh", "agent": HERE / "guest-agent.sh"}
    modules = sorted((kernel_folder / "modules").glob("*.ko"))
    name = digest(
        kernel_folder.name.encode(), vhs_load.name.encode(), *(p.read_bytes() for p in scripts.values())
    )
    archive = cache / f"initramfs-{name}.cpio.gz"
    if archive.exists():
        return archive
    with tempfile.TemporaryDirectory(prefix="vhostsync-initramfs-") as scratch:
        root = Path(scratch)
        for folder in ("bin", "dev", "proc", "sys", "tmp", "mnt", "modules"):
            (root / folder).mkdir()
        for target, source in scripts.items():
            shutil.copy(source, root / target)
            (root / target).chmod(0o755)
        for program, target in ((busybox, "bin/busybox"), (vhs_load, "bin/vhs-load")):
            shutil.copy(program, root / target)
            (root / target).chmod(0o755)
        for module in modules:
            shutil.copy(module, root / "modules")
        names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*"))) + "\n"
        packed = subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"],
            cwd=root,
            input=names.encode(),
            capture_output=True,
            check=True,
        )
        partial = archive.with_suffix(".partial")
        partial.write_bytes(gzip.compress(packed.stdout, compresslevel=1))
        partial.rename(archive)
    return archive


def guest_assets() -> GuestAssets:
    """Make what is missing and return it all. Raises AssetError with one clear sentence.

    Works from the cache alone once everything is there: no package list is asked then.
    """
    if platform.machine() != "x86_64":
        raise AssetError(f"the test guest is x86-64 only; this machine is {platform.machine()}")
    cache = cache_folder()
    ready = sorted(cache.glob("kernel-*/vmlinuz"), key=lambda path: path.stat().st_mtime)
    kernel_folder = ready[-1].parent if ready else fetch_kernel(cache)
    busybox = fetch_busybox(cache)
    vhs_load = compile_tool(cache, "vhs-load")
    initramfs = build_initramfs(cache, kernel_folder, busybox, vhs_load)
    return GuestAssets(
        kernel_folder / "vmlinuz", initramfs, busybox, vhs_load, compile_tool(cache, "uml-launch")
    )


if __name__ == "__main__":
    try:
        print(guest_assets())
    except AssetError as problem:
        sys.exit(f"vhostsync: {problem}")
