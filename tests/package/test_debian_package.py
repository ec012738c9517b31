# SPDX-License-Identifier: Apache-2.0
"""The Debian packages: built from a clean copy, looked at by lintian, lived through in clean trees."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.package.build import ROOT, build_debian_packages, copy_of_the_tree, succeed
from tests.package.clean_tree import Root
from vhostsync import __version__

pytestmark = [pytest.mark.package, pytest.mark.xdist_group("package"), pytest.mark.timeout(1800)]
NAMES = ("vhostsync", "vhostsync-nbd", "vhostsync-rbd")
OLDER = "0.1.999"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_debian_packages(tmp_path_factory.mktemp("debian"))


def debs(folder: Path) -> list[Path]:
    return [next(folder.glob(f"{name}_*.deb")) for name in NAMES]


def test_each_kind_of_disk_that_needs_a_library_is_a_package_of_its_own(packages: Path) -> None:
    for deb in debs(packages):
        depends = subprocess.check_output(["dpkg-deb", "-f", deb, "Depends"], text=True)
        assert ("libnbd" in depends, "librbd" in depends) == ("-nbd_" in deb.name, "-rbd_" in deb.name)
        assert "anyio" not in depends and "exceptiongroup" not in depends  # bundled


def test_lintian_finds_no_error(packages: Path) -> None:
    (changes,) = packages.glob("*.changes")
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error", changes],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_profile_of_apparmor_is_well_formed() -> None:
    done = subprocess.run(
        ["apparmor_parser", "--skip-kernel-load", "--skip-cache", ROOT / "debian/apparmor-profile"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def older_than(deb: Path, folder: Path) -> None:
    """The same package with a lower number."""
    tree = folder / "tree"
    succeed(["dpkg-deb", "-R", deb, tree], folder)
    control = tree / "DEBIAN/control"
    control.write_text(control.read_text().replace(f"Version: {__version__}", f"Version: {OLDER}"))
    succeed(["dpkg-deb", "-b", tree, folder], folder)
    shutil.rmtree(tree)


def put_outside(root: Root, packages: Path) -> None:
    for name in ("packages", "older"):
        (root.outside / name).mkdir()
    for deb in debs(packages):
        shutil.copy(deb, root.outside / "packages")
    older_than(debs(packages)[0], root.outside / "older")
    shutil.copy(Path(__file__).with_name("life.sh"), root.outside)


def lived(root: Root) -> str:
    return root.run("exec sh /outside/life.sh", timeout_s=900)


def test_it_lives_on_debian_12(packages: Path, tmp_path: Path) -> None:
    root = Root("bookworm", tmp_path)
    put_outside(root, packages)
    assert f"the whole life of {OLDER} and {__version__}" in lived(root)


@pytest.mark.package_whole
def test_it_is_built_and_lives_on_debian_13(packages: Path, tmp_path: Path) -> None:
    """Without a network: what it bundles lies in the source already."""
    builder = Root("trixie", tmp_path / "builder")
    source = copy_of_the_tree(builder.outside / "source")
    succeed(["cp", "-r", packages / "source/debian/bundled", source / "debian/bundled"], tmp_path)
    builder.run(
        "apt-get -q update && apt-get -q -y install --no-install-recommends dpkg-dev && "
        "cd /outside/source && "
        "apt-get -q -y --no-install-recommends build-dep ./ && "
        "unshare --net dpkg-buildpackage -b -uc -us && mkdir /outside/made && mv ../*.deb /outside/made",
        timeout_s=1500,
    )
    root = Root("trixie", tmp_path / "life")
    put_outside(root, builder.outside / "made")
    assert f"the whole life of {OLDER} and {__version__}" in lived(root)
