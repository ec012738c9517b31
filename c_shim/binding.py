# SPDX-License-Identifier: Apache-2.0
"""Run by the build: `binding.py MODULE HEADER OUTPUT.c API.h…` writes the extension through which Python
uses a C library. Each API.h is what cffi parses, in this order; HEADER is what the C code includes.

A library of disks (disk/disk_services.h) shares the types of vhostsync's own, so that a disk of this one is a
disk for that one."""

import sys
from pathlib import Path

from cffi import FFI

SHIM = "vhostsync._shim"
SHIM_API = ("shim_api.h", "shim_figures.h")


def main(module: str, header: str, output: str, *api: str) -> None:
    binding = FFI()
    if module != SHIM:
        shim = FFI()
        for name in SHIM_API:
            shim.cdef((Path(__file__).resolve().parent / name).read_text())
        shim.set_source(SHIM, "")
        binding.include(shim)
    for path in api:
        binding.cdef(Path(path).read_text())
    binding.set_source(module, f'#include "{header}"')
    binding.emit_c_code(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
