# SPDX-License-Identifier: Apache-2.0
"""python -m tests.powercut [--minutes M] [--seeds N] [--first SEED] [--scene NAME]...

Runs scenes under the power-cut checker and prints how many states were checked. Each seed plays every scene,
and now and then another one on what a power cut has left of it.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.powercut.checker import LossError, Tally
from tests.powercut.runs import check_scene, site
from tests.powercut.scenes import SCENES


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=0.0, help="go on with further seeds for so long")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds at least")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--restarts", type=int, default=300, help="in each record")
    names = [scene.name for scene in SCENES]
    parser.add_argument("--scene", action="append", choices=names, help="only this one, or these")
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    tally, records, seed = Tally(), 0, arguments.first
    with site() as where:
        while seed < arguments.first + arguments.seeds or time.monotonic() < until:
            for scene in SCENES:
                if arguments.scene is None or scene.name in arguments.scene:
                    try:
                        records += check_scene(where, scene, seed, arguments.restarts, tally)
                    except LossError as error:
                        print(f"seed {seed}, scene {scene.name}: {error}")
                        print(f"{records} records without a loss before it: {tally}")
                        return 1
            print(f"seed {seed}: {records} records so far, {tally}", flush=True)
            seed += 1
    print(f"no loss in {records} records: {tally}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
