# SPDX-License-Identifier: Apache-2.0
"""The container image, the system calls that it may make, and the manifest for Kubernetes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.rig import Served, image, same_content, write_block
from tests.package.build import ROOT, copy_of_the_tree, succeed
from tests.package.clean_tree import clean_tree
from vhostsync import __version__
from vhostsync.cli.main import main

PROFILE = ROOT / "share/container/seccomp.json"
MANIFEST = ROOT / "share/kubernetes/vhostsync.yaml"


def allowed() -> set[str]:
    rules = json.loads(PROFILE.read_text())["syscalls"]
    return {name for rule in rules if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}


def test_the_profile_lets_through_io_uring_and_no_right_of_root() -> None:
    assert {"io_uring_setup", "io_uring_enter", "io_uring_register"} <= allowed()
    assert not {"mount", "pivot_root", "bpf", "init_module", "setns", "unshare", "ptrace"} & allowed()


def test_a_backend_needs_no_call_that_the_profile_lacks(tmp_path: Path) -> None:
    """One that it lacked would kill it here (in a container it fails)."""
    runner = Path(__file__).with_name("under_profile.py")
    source, other = image(tmp_path / "a.img"), tmp_path / "b.img"
    with Served(
        tmp_path, source, "--bitmap", tmp_path / "bits", before=(sys.executable, runner, PROFILE)
    ) as served:
        with served.guest() as guest:
            write_block(guest, 1, seed=1)
            served.start_mirror(other, create=True)
            write_block(guest, 2, seed=2)
            assert guest.flush_now().ok
            served.qmp.execute("verify")
            served.qmp.execute("switch", **{"keep-mirror": True})
            write_block(guest, 3, seed=3)
        served.qmp.execute("query-stats")
        privileges = next(
            line for line in served.process.last_output(200).splitlines() if '"privileges"' in line
        )
        assert {"seccomp", "io-uring", "no-new-privs"} <= set(json.loads(privileges)["held"])
        served.stop()
    assert same_content(source, other)


def documents() -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="NOT TESTED: the manifest; `./run package` does")
    found: list[dict[str, Any]] = list(yaml.safe_load_all(MANIFEST.read_text()))
    return found


@pytest.mark.package
def test_the_manifest_keeps_to_the_schemas_of_kubernetes() -> None:
    """Native side cars (`restartPolicy: Always`) are in Kubernetes since 1.29."""
    import kubernetes_validate

    for document in documents():
        for version in ("1.29", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.package
def test_the_manifest_says_what_this_program_understands(capsys: pytest.CaptureFixture[str]) -> None:
    _, pod = documents()
    (backend,) = pod["spec"]["initContainers"]
    assert backend["image"] == f"vhostsync:{__version__}"
    with pytest.raises(SystemExit) as left:
        main([*backend["args"], "--help"])
    assert left.value.code == 0 and "usage: vhostsync serve" in capsys.readouterr().out
    (machine,) = pod["spec"]["containers"]
    socket = next(arg for arg in backend["args"] if arg.startswith("--socket-path=")).split("=")[1]
    assert any(f"socket={socket}," in word for word in machine["command"])
    shared = [{mount["mountPath"] for mount in each["volumeMounts"]} for each in (backend, machine)]
    assert str(Path(socket).parent) in shared[0] & shared[1]


@pytest.mark.package
@pytest.mark.package_whole
@pytest.mark.timeout(1800)
def test_the_image_is_built_and_serves(tmp_path: Path) -> None:
    """From a tree that was made here, in the place of the registry's image."""
    if shutil.which("buildah") is None:
        pytest.skip("NOT TESTED: the container image; apt install buildah")
    tree = clean_tree("trixie")
    source = copy_of_the_tree(tmp_path / "source")
    bundled = next(tree.parent.glob("debian-bundled"))
    succeed(["cp", "-r", bundled, source / "debian/bundled"], tmp_path)
    (base,) = set(
        re.findall(r"^FROM (\S+)", (ROOT / "share/container/Containerfile").read_text(), re.MULTILINE)
    )
    store: list[str | Path] = ["buildah", "--storage-driver", "vfs"]
    store += ["--root", tmp_path / "store", "--runroot", tmp_path / "run"]
    empty = succeed([*store, "from", "scratch"], tmp_path).strip()
    succeed([*store, "add", empty, tree, "/"], tmp_path)
    succeed([*store, "commit", empty, base], tmp_path)
    options = ["--isolation", "chroot", "--network", "host", "--pull=never", "-t", "vhostsync"]
    succeed([*store, "build", *options, "-f", source / "share/container/Containerfile", source], tmp_path)
    made = succeed([*store, "from", "--pull=never", "vhostsync"], tmp_path).strip().splitlines()[-1]
    said = succeed(
        [*store, "run", "--isolation", "chroot", made, "/usr/bin/vhostsync", "--version"], tmp_path
    )
    assert said.strip() == f"vhostsync {__version__}"
