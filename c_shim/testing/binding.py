# SPDX-License-Identifier: Apache-2.0
"""Run by the build: `binding.py OUTPUT.c` writes the extension through which the tests use the testing
library. It shares the types of vhostsync's own, so that a disk of this one is a disk for that one."""

import sys
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent


def main(output: str) -> None:
    shim = FFI()
    shim.cdef((HERE.parent / "shim_api.h").read_text())
    shim.set_source("vhostsync._shim", "")
    testing = FFI()
    testing.include(shim)
    testing.cdef((HERE / "testing_api.h").read_text())
    testing.set_source("tests._testing", '#include "testing.h"')
    testing.emit_c_code(output)


if __name__ == "__main__":
    main(sys.argv[1])
