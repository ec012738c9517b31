# SPDX-License-Identifier: Apache-2.0
"""The version stands in one place; what else has to say it says the same."""

import importlib.metadata
import re
from pathlib import Path

from vhostsync import __version__

ROOT = Path(__file__).parents[2]


def test_the_changelogs_end_with_this_version() -> None:
    changes = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    package = re.match(r"vhostsync \((\S+)\) ", (ROOT / "debian/changelog").read_text())
    assert changes is not None and package is not None
    assert (changes[1], package[1]) == (__version__, __version__)


def test_the_build_takes_it_from_there() -> None:
    assert importlib.metadata.version("vhostsync") == __version__
    assert __version__ not in (ROOT / "meson.build").read_text()
    assert "version" not in re.findall(r"^(\w+) =", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
