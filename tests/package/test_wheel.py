# SPDX-License-Identifier: Apache-2.0
"""The wheel: one for every Python, with liburing in it, installed where nothing could be compiled."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.package.build import build_wheel, succeed
from tests.package.clean_tree import Root
from vhostsync import __version__

pytestmark = [pytest.mark.package, pytest.mark.xdist_group("package"), pytest.mark.timeout(1200)]

USE = """
set -eu
bin=$1 work=$2
$bin/vhostsync --version
truncate -s 8M $work/a.img
dd if=/dev/urandom of=$work/a.img bs=64k count=16 conv=notrunc status=none
export STATE_DIRECTORY=$work/state VHOSTSYNC_CONTROL=$work/control
$bin/vhostsync serve --socket-path $work/vm.sock --control $work/control --blk-file $work/a.img \\
    >$work/log 2>&1 &
backend=$!
tries=300
while [ ! -e $work/control ]; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] && kill -0 $backend || { cat $work/log; exit 1; }
    sleep 0.1
done
$bin/vhostsync mirror start $work/b.img --create --wait
$bin/vhostsync switch
$bin/vhostsync quit
wait $backend
cmp $work/a.img $work/b.img
echo served and mirrored
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def with_dependencies(wheel: Path, python: str, folder: Path) -> Path:
    """A folder that `pip install --no-index` finds everything in, for that Python."""
    words: list[str | Path] = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:"]
    succeed([*words, "--python-version", python, "--dest", folder, wheel], wheel.parent)
    return folder


def test_it_is_for_every_python_and_needs_the_c_library_alone(wheel: Path) -> None:
    assert wheel.name == f"vhostsync-{__version__}-cp311-abi3-manylinux_2_34_x86_64.whl"
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        assert [name for name in names if name.endswith(".so")] == ["vhostsync/_shim.abi3.so"]
        needed = subprocess.run(
            ["readelf", "--dynamic", "--wide", file.extract("vhostsync/_shim.abi3.so", wheel.parent)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    libraries = {line.split("[")[1][:-1] for line in needed.splitlines() if "(NEEDED)" in line}
    assert libraries <= {"libc.so.6", "ld-linux-x86-64.so.2"}


def test_it_carries_the_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        carried = {
            Path(name).name: file.read(name).decode() for name in file.namelist() if "/licenses/" in name
        }
    assert "Apache License" in carried["LICENSE"]
    assert (
        "Jens Axboe" in carried["liburing.txt"] and "Permission is hereby granted" in carried["liburing.txt"]
    )


def interpreter(python: str) -> str | None:
    """On the PATH, or of pyenv, whose own words on the PATH need not work."""
    kept = sorted(Path.home().glob(f".pyenv/versions/{python}.*/bin/python{python}"))
    return str(kept[-1]) if kept else shutil.which(f"python{python}")


@pytest.mark.parametrize(
    "suite, python", [("bookworm", "3.11"), pytest.param("trixie", "3.13", marks=pytest.mark.package_whole)]
)
def test_it_serves_in_a_tree_without_a_compiler(suite: str, python: str, wheel: Path, tmp_path: Path) -> None:
    root = Root(suite, tmp_path)
    with_dependencies(wheel, python, root.outside / "wheels")
    (root.outside / "use.sh").write_text(USE)
    said = root.run(
        "apt-get -q update && apt-get -q -y install --no-install-recommends python3-venv && "
        "! command -v cc && python3 -m venv /venv && "
        "/venv/bin/pip install --quiet --no-index --find-links /outside/wheels vhostsync && "
        "mkdir /disks && sh /outside/use.sh /venv/bin /disks"
    )
    assert "served and mirrored" in said


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_it_serves_with_each_python(python: str, wheel: Path, tmp_path: Path) -> None:
    program = interpreter(python)
    if program is None:
        pytest.skip(f"NOT TESTED: the wheel with Python {python}, which is not on this machine")
    succeed([program, "-m", "venv", tmp_path / "venv"], tmp_path)
    wheels = with_dependencies(wheel, python, tmp_path / "wheels")
    install: list[str | Path] = [
        tmp_path / "venv/bin/pip",
        "install",
        "--quiet",
        "--no-index",
        "--find-links",
        wheels,
    ]
    succeed([*install, "vhostsync"], tmp_path, CC="/bin/false")
    (tmp_path / "use.sh").write_text(USE)
    said = succeed(["sh", "use.sh", tmp_path / "venv/bin", tmp_path], tmp_path)
    assert "served and mirrored" in said
