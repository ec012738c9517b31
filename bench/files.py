# SPDX-License-Identifier: Apache-2.0
"""Files to measure on, all made the same way; and the programs that have to be there."""

import contextlib
import mmap
import os
import shutil
import subprocess
from pathlib import Path

from bench.sample import BenchError


def make_file(path: Path, size_bytes: int, *, direct: bool) -> Path:
    """Allocated and written once from beginning to end, so that no measurement pays for that."""
    if not path.exists() or path.stat().st_size != size_bytes:
        path.unlink(missing_ok=True)
        subprocess.run(["fallocate", "-l", str(size_bytes), str(path)], check=True)
    flags = os.O_WRONLY | (os.O_DIRECT if direct else 0)
    buffer = mmap.mmap(-1, 4 << 20)  # aligned, for direct I/O
    buffer.write(os.urandom(4 << 20))
    with contextlib.closing(buffer):
        fd = os.open(path, flags)
        try:
            done = 0
            while done < size_bytes:
                done += os.pwrite(fd, memoryview(buffer)[: min(len(buffer), size_bytes - done)], done)
            os.fsync(fd)
        finally:
            os.close(fd)
    return path


def require(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            raise BenchError(f"{program} is not installed (Debian: fio, qemu-system-common, qemu-utils)")
