# SPDX-License-Identifier: Apache-2.0
"""How the environment of `./run` finds the tree that it belongs to."""

import subprocess
import venv
from pathlib import Path

from tests import this_tree


def test_a_path_with_any_letters_is_found_in_any_locale(tmp_path: Path) -> None:
    package = tmp_path / "a b's ü" / "vhostsync"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, this_tree.__file__, package, tmp_path / "built"], check=True)
    for locale in "C", "C.UTF-8":
        found = subprocess.run(
            [python, "-c", "import vhostsync; print(ascii(vhostsync.__file__))"],
            env={"LC_ALL": locale}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert found.stdout.strip() == ascii(str(package / "__init__.py")), found.stderr
