# SPDX-License-Identifier: Apache-2.0
"""What all tests share: markers, the guest's pieces, a work folder that is gone afterwards."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.guest.assets import AssetError, GuestAssets, guest_assets

MARKERS = (
    "alone: no other test runs meanwhile; what it counts, or is given by the kernel, is the whole machine's",
    "uml: boots Linux's user-mode kernel (Debian's package user-mode-linux)",
    "package: builds the Debian packages or the wheel, and installs them (`./run package`)",
    "package_whole: a part of that which takes minutes: other distributions, the container image",
    "debian13: runs frontends of a Debian 13 tree in the cache folder (`./run test --debian13`)",
)

# How fast a shared machine makes examples says nothing about the code (on a new machine hypothesis first
# builds its tables of characters).
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--debian13", action="store_true", help="also run the frontends of Debian 13 (libblkio, QEMU 10)"
    )
    parser.addoption(
        "--package", choices=("part", "whole"),
        help="also build and install the packages: those for this distribution and the wheel, or everything",
    )  # fmt: skip


def pytest_runtest_setup(item: pytest.Item) -> None:
    asked = item.config.getoption("--package")
    if item.get_closest_marker("package") and asked is None:
        pytest.skip("NOT TESTED: the packages; `./run package` builds and tests them")
    if item.get_closest_marker("package_whole") and asked != "whole":
        pytest.skip("NOT TESTED: the packages elsewhere; `./run package` builds and tests them")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # In the background of a script it is ignored, and would be by all that the tests start.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def _failed_stages() -> str:
    """What failed before pytest began (set by `./run test`): pytest's summary ends the output, so it tells
    of it."""
    return os.environ.get("VHOSTSYNC_FAILED_STAGES", "")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _failed_stages() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _failed_stages():
        terminalreporter.section("failed before pytest", red=True)
        terminalreporter.line(_failed_stages())


def _alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long tests first, and then those that boot a guest, so that of several processes none is left with
    one at the end; last those beside which nothing may run."""

    def turn(item: pytest.Item) -> tuple[bool, ...]:
        return _alone(item), *(item.get_closest_marker(name) is None for name in ("slow", "guest"))

    items.sort(key=turn)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Where several processes run tests of this tree (pytest's -n), one that is to be alone waits until no
    other is under way, and none begins before it ends.

    tryfirst: the wait is no part of a test's time limit."""
    with Path(__file__).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if _alone(item) else fcntl.LOCK_SH)
        try:
            return (yield)
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)


@pytest.fixture(scope="session")
def assets() -> GuestAssets:
    """Kernel, initramfs and writer, made if they are missing. A machine that cannot have them fails the
    test."""
    try:
        return guest_assets()
    except AssetError as error:
        pytest.fail(f"no guest to test with: {error}", pytrace=False)


@pytest.fixture
def anyio_backend() -> str:
    """The daemon runs on asyncio."""
    return "asyncio"


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder on a real disk (direct I/O works there) with a name short enough for sockets; removed at the
    end."""
    folder = Path(tempfile.mkdtemp(prefix="vhs-", dir="/var/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
