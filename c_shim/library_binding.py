# SPDX-License-Identifier: Apache-2.0
"""Run by the build: `library_binding.py MODULE API.h HEADER OUTPUT.c` writes the extension through which
Python uses a library of disks (disk/disk_services.h). It shares the types of vhostsync's own, so that a disk
of this one is a disk for that one. API.h is what cffi parses; HEADER is what the C code includes."""

import sys
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent


def main(module: str, api: str, header: str, output: str) -> None:
    shim = FFI()
    shim.cdef((HERE / "shim_api.h").read_text())
    shim.set_source("vhostsync._shim", "")
    library = FFI()
    library.include(shim)
    library.cdef(Path(api).read_text())
    library.set_source(module, f'#include "{header}"')
    library.emit_c_code(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
