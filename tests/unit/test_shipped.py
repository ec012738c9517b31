# SPDX-License-Identifier: Apache-2.0
"""What is installed has nothing of the tests, and is all that serving takes."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import testing_library
from tests.guest.processes import Process, wait_listening
from tests.sizes import MIB
from vhostsync import _shim

EXTENSION = Path(_shim.__file__)


def test_the_extension_has_no_disk_of_the_tests() -> None:
    assert b"vs_test" not in EXTENSION.read_bytes()
    assert not [name for name in dir(_shim.lib) if name.startswith("vs_test")]


def test_the_testing_library_has_them_and_all_that_the_extension_has() -> None:
    assert {"vs_test_disk", "vs_test_record_new", "vs_testing_begin"} <= set(dir(testing_library.lib))
    assert testing_library.lib.VS_CMD_SNAPSHOT == _shim.lib.VS_CMD_SNAPSHOT
    assert testing_library.ffi.typeof("vs_disk *") is _shim.ffi.typeof("vs_disk *")


def test_a_wheel_is_made_of_the_package_alone() -> None:
    """As meson-python makes it: from what the build has to install."""
    plan = json.loads((EXTENSION.parents[1] / "meson-info" / "intro-install_plan.json").read_text())
    installed = {
        source: Path(entry["destination"]) for kind in plan.values() for source, entry in kind.items()
    }
    assert str(EXTENSION) in installed
    assert {path.parts[1] for path in installed.values()} == {"vhostsync"}
    assert not [source for source in installed if "testing" in source or "/tests" in source]


REPOSITORY = Path(__file__).parents[2]


def test_no_compiled_python_of_the_source_folder_is_installed() -> None:
    """meson takes no pattern: each folder with Python in it has to be named."""
    package = REPOSITORY / "vhostsync"
    folders = {file.parent.relative_to(package) for file in package.rglob("*.py")}
    excluded = re.findall(r"'([\w/]*__pycache__)'", (REPOSITORY / "meson.build").read_text())
    assert sorted(excluded) == sorted(str(folder / "__pycache__") for folder in folders)


ONE_WHEEL = pytest.mark.xdist_group("wheel")
"""It is built once, by one process: else by each of those that run tests."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Built by what the tests' environment has, so that nothing is fetched, and from a copy, so that nothing
    is left in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    for name in ("vhostsync", "c_shim", "bench", "share/licenses", "tests/c", "tests/guard"):
        shutil.copytree(
            REPOSITORY / name, sources / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    for path in REPOSITORY.iterdir():
        if path.is_file():
            shutil.copy2(path, sources)
    build = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--no-build-isolation", "--no-index", "--wheel-dir", folder, sources],
        check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert build.returncode == 0, build.stdout
    (built,) = folder.glob("*.whl")
    yield built


@ONE_WHEEL
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_wheel_has_nothing_of_the_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {name.partition("/")[0].partition("-")[0] for name in names} == {"vhostsync"}
        assert not [name for name in names if "test" in name]
        extensions = [name for name in names if name.endswith(".so")]
        assert extensions
        assert not [name for name in extensions if b"vs_test" in archive.read(name)]
        modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "vhostsync").rglob("*.py")}
        assert modules <= set(names)


@ONE_WHEEL
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_wheel_serves_and_mirrors(wheel: Path, work: Path) -> None:
    """Installed beside nothing but what it depends on: without site.py no editable install is found."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--no-index", "--target", work / "installed", wheel],
        check=True, capture_output=True,
    )  # fmt: skip
    paths = [str(work / "installed"), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    program = f"import sys; sys.path += {paths!r}; from vhostsync.__main__ import run; sys.exit(run())"
    command = [sys.executable, "-I", "-S", "-c", program]
    source, destination, socket = work / "a.img", work / "b.img", work / "vm.sock"
    source.write_bytes(os.urandom(MIB) + bytes(MIB))
    control = Path(f"{socket}.control")
    process = Process(
        "vhostsync",
        [*command, "serve", "--socket-path", socket, "--blk-file", source, "--state-file", work / "record"],
        work / "log",
    )
    try:
        wait_listening(process, control)
        for words in (["mirror", "start", str(destination), "--create", "--wait"], ["switch"]):
            subprocess.run([*command, "--control", str(control), *words], check=True, timeout=60)
        assert process.terminate() == 0
    finally:
        process.kill()
    assert destination.read_bytes() == source.read_bytes()
