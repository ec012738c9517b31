# SPDX-License-Identifier: Apache-2.0
"""Which qemu-storage-daemon the rival is: the newest that can be had, of a Debian 13 tree in the cache
folder (made if it is missing). Without root, or where none can be made, it is the host's own. Its version
stands in the table."""

import functools
import os
import subprocess
import sys

from tests.guest.assets import AssetError
from tests.guest.debian13 import inside, tree

NAME = "qemu-storage-daemon"


@functools.cache
def rival_program() -> tuple[str, ...]:
    """The words before its options. The process that they start is the program itself: nothing in between
    forks, so that its pid is the one whose time counts."""
    if os.geteuid() == 0:
        try:
            return (*inside(tree()), NAME)
        except AssetError as error:
            print(f"the rival is this host's, not Debian 13's: {error}", file=sys.stderr)
    return (NAME,)


def rival_version() -> str:
    done = subprocess.run([*rival_program(), "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0]
