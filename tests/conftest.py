# SPDX-License-Identifier: Apache-2.0
"""What all tests share: markers, the guest's pieces, a work folder that is gone afterwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.assets import AssetError, GuestAssets, guest_assets

MARKERS = (
    "uml: boots Linux's user-mode kernel (Debian's package user-mode-linux)",
    "debian13: runs frontends of a Debian 13 tree in the cache folder (`./run test --debian13`)",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--debian13", action="store_true", help="also run the frontends of Debian 13 (libblkio, QEMU 10)"
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


@pytest.fixture(scope="session")
def assets() -> GuestAssets:
    """Kernel, initramfs and writer, made if they are missing. A machine that cannot have them fails the
    test."""
    try:
        return guest_assets()
    except AssetError as error:
        pytest.fail(f"no guest to test with: {error}", pytrace=False)


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder on a real disk (direct I/O works there) with a name short enough for sockets; removed at the
    end."""
    folder = Path(tempfile.mkdtemp(prefix="vhs-", dir="/var/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
