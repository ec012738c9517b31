# SPDX-License-Identifier: Apache-2.0
"""The testing library (c_shim/testing, testing_api.h): the tests' own kinds of disks, which come to the
engine as any kind does that is no part of vhostsync. It is built beside the extension, installed nowhere.

`lib` has what the extension has as well, and `ffi` the same types: a test that uses this needs no other."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from vhostsync import _shim

NAME = "tests._testing"


def _load() -> ModuleType:
    beside = Path(_shim.__file__).parent
    found = [path for path in beside.glob("_testing.*.so") if path.name[8:] == Path(_shim.__file__).name[5:]]
    if not found:
        raise ImportError(
            f"there is no testing library beside {_shim.__file__}: an installed vhostsync has none, so run "
            f"the tests from an editable install (./run test)"
        )
    loader = ExtensionFileLoader(NAME, str(found[0]))
    spec = importlib.util.spec_from_file_location(NAME, found[0], loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    loader.exec_module(module)
    return module


_library = _load()
ffi: Any = _library.ffi
lib: Any = _library.lib
lib.vs_testing_begin(lib.vs_disk_services())
