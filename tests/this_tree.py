# SPDX-License-Identifier: Apache-2.0
"""How the virtual environment of `./run` finds this tree's package, and quickly: the tests start it thousands
of times.

The finder of an editable install starts ninja in every process that imports vhostsync, and compiles every
module anew, for it keeps no compiled Python. `./run` has built before it starts anything, and an engine
refuses an extension of other sources. So `./run` puts this module in that finder's place:

    python tests/this_tree.py PACKAGE EXTENSIONS    the folders of the modules and of the built extensions
"""

import sys

NAME = "_vhostsync_this_tree"


class ThisTree:
    """Before all other finders: whatever is on sys.path, the tests are of this tree and its build."""

    def __init__(self, package: str, extensions: str) -> None:
        self._folders = [package, extensions]

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> object:
        if name != "vhostsync":
            return None
        # Here, for most processes of the environment need none of it.
        from importlib.util import spec_from_file_location

        start = f"{self._folders[0]}/__init__.py"
        return spec_from_file_location(name, start, submodule_search_locations=self._folders)


def find(package: str, extensions: str) -> None:
    sys.meta_path.insert(0, ThisTree(package, extensions))  # type: ignore[arg-type]  # it needs no more of a finder


def _install(package: str, extensions: str) -> None:
    import shutil
    import sysconfig
    from pathlib import Path

    if sys.prefix == sys.base_prefix:  # so it is under -S, too: each Python here would find this tree
        sys.exit("this_tree.py: this is no virtual environment; ./run makes one")
    site = Path(sysconfig.get_paths()["purelib"])
    shutil.copyfile(__file__, site / f"{NAME}.py")
    # Of several .pth files the last one's finder goes first.
    # ASCII, whatever letters paths have: Python reads it in the locale's encoding, and ends where it cannot.
    line = f"import {NAME}; {NAME}.find({package!a}, {extensions!a})\n"
    (site / "vhostsync-this-tree.pth").write_text(line)
    (site / "vhostsync-editable.pth").unlink(missing_ok=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: this_tree.py PACKAGE EXTENSIONS")
    _install(*sys.argv[1:])
