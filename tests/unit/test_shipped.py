# SPDX-License-Identifier: Apache-2.0
"""What is installed has nothing of the tests."""

import json
from pathlib import Path

from tests import testing_library
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
