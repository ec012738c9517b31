# SPDX-License-Identifier: Apache-2.0
"""Run by the build: `binding.py MODULE API.h HEADER OUTPUT.c` writes the extension through which Python uses
a C library. API.h is what cffi parses; HEADER is what the C code includes.

A library of disks (disk/disk_services.h) shares the types of vhostsync's own, so that a disk of this one is a
disk for that one."""

import sys
from pathlib import Path

from cffi import FFI

SHIM = "vhostsync._shim"


def main(module: str, api: str, header: str, output: str) -> None:
    binding = FFI()
    if module != SHIM:
        shim = FFI()
        shim.cdef((Path(__file__).resolve().parent / "shim_api.h").read_text())
        shim.set_source(SHIM, "")
        binding.include(shim)
    binding.cdef(Path(api).read_text())
    binding.set_source(module, f'#include "{header}"')
    binding.emit_c_code(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
