# SPDX-License-Identifier: Apache-2.0
"""python -m tests.groups [--times 200] [counters | ledgers]

Takes snapshots of two disks of a running guest, so often, and looks at each set: `counters` is a guest that
writes to both disks in turn; `ledgers` (with a user-mode kernel) one with a database on both.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.groups import counters, ledgers
from tests.guest.assets import guest_assets
from tests.guest.uml import uml_missing


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=200, help="how many snapshots (200)")
    parser.add_argument("proof", nargs="?", choices=("counters", "ledgers"), help="only this one")
    arguments = parser.parse_args()
    for name in ("counters", "ledgers"):
        if arguments.proof not in (None, name):
            continue
        if name == "ledgers" and (why := uml_missing()) is not None:
            print(f"{name}: not done: {why}")
            return 1
        with tempfile.TemporaryDirectory() as folder:
            if name == "counters":
                print(f"{name}: {counters.prove(Path(folder), arguments.times)}", flush=True)
            else:
                print(f"{name}: {ledgers.prove(guest_assets(), Path(folder), arguments.times)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
