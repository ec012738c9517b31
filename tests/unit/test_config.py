# SPDX-License-Identifier: Apache-2.0
import contextlib
import re
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostsync import config
from vhostsync.config import ServeConfig
from vhostsync.errors import ConfigError
from vhostsync.mirror_target import MirrorTarget
from vhostsync.option_values import TcpAddress, parse_metrics
from vhostsync.quantities import parse_bytes, parse_seconds

DISK = "/disks/a.img"
SOCKET = Path("/run/vm.sock")


def make(**given: Any) -> ServeConfig:
    return ServeConfig(**{"blk_file": DISK, "socket_path": SOCKET, **given})


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512B", 512),
        ("64K", 64 << 10),
        ("64KiB", 64 << 10),
        ("64M", 64 << 20),
        ("64MB", 64 << 20),
        ("64mb", 64 << 20),
        ("1GiB", 1 << 30),
        ("1.5g", 3 << 29),
        ("2T", 2 << 40),
        (" 7 ", 7),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "M", "-1", "+1", "1e3", "64MBi", "64 M", "0x10", "1.5", "٣", "1" * 41, "9999999T", "nan", "1_0"],
)
def test_what_is_no_size_is_a_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match=r"\.$"):
        parse_bytes(text)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_sentence(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_bytes(text) >= 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 10), ("10s", 10), ("2.5s", 2.5), ("500ms", 0.5), ("2m", 120), ("2min", 120), ("1h", 3600)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1", "1d", "1 s", "inf", "nan", "1" * 41])
def test_what_is_no_duration_is_a_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a duration"):
        parse_seconds(text)


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = make()
    assert settings.log_bytes == 64 << 20
    assert settings.max_lag_ms == 500
    assert (settings.on_congestion, settings.on_destination_error) == ("block", "degrade")
    assert settings.congestion_bytes == 56 << 20
    assert settings.destination_timeout_s == 10
    assert settings.stop_timeout_s == 1
    assert settings.write_cache
    assert settings.cache == "none"
    assert settings.control_socket == Path("/run/vm.sock.control")


def test_it_is_frozen_and_its_paths_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = make(blk_file="a.img", socket_path=Path("s"))
    assert settings.blk_file == str(tmp_path / "a.img")
    assert settings.control_socket == tmp_path / "s.control"
    with pytest.raises(FrozenInstanceError):
        settings.num_queues = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"fd": 3}, "exactly one of --socket-path and --fd"),
        ({"socket_path": None}, "exactly one of --socket-path and --fd"),
        ({"socket_path": None, "fd": -1}, "--fd -1 is not a file descriptor"),
        ({"blk_file": "/a\0b"}, "zero byte"),
        ({"blk_file": ""}, "--blk-file is empty"),
        ({"blk_file": "."}, "--blk-file is empty"),
        ({"blk_file": "iscsi://h/x"}, "there are no disks of the kind iscsi here; there are paths of image"),
        ({"control_path": Path()}, "--control is empty"),
        ({"socket_path": Path("/" + "x" * 107)}, "--socket-path: .* longer than the 107 bytes"),
        ({"socket_path": Path("/" + "x" * 100)}, "--control: .* longer than the 107 bytes"),
        ({"socket_path": Path("/" + "é" * 60)}, "longer than the 107 bytes"),
        ({"control_path": SOCKET}, "--control and --socket-path both name"),
        ({"metrics": SOCKET}, "--metrics and --socket-path both name"),
        ({"state_file": Path("/s"), "no_state_file": True}, "not both"),
        ({"cache": "unsafe"}, "--cache unsafe is not known here; write none or writeback"),
        ({"destination_cache": "unsafe"}, "--destination-cache"),
        ({"num_queues": 0}, "--num-queues 0 is out of range; it is from 1 to 64"),
        ({"num_queues": 65}, "--num-queues 65"),
        ({"block_bytes": 1024}, "--block-size 1024 is not known here; write 512 or 4096"),
        ({"serial": "x" * 21}, "longer than 20 characters"),
        ({"serial": "é"}, "not printable ASCII"),
        ({"serial": "a\n"}, "not printable ASCII"),
        ({"log_bytes": (8 << 20) - 1}, "--log-size"),
        ({"log_bytes": 1 << 60}, "--log-size"),
        ({"max_lag_ms": 0}, "--max-lag-ms"),
        ({"on_congestion": "drop"}, "--on-congestion drop is not known here; write block or pull-ahead"),
        ({"on_congestion": "pull-ahead", "congestion_fill_bytes": 65 << 20}, "--congestion-fill"),
        ({"congestion_fill_bytes": 32 << 20}, "--congestion-fill needs --on-congestion pull-ahead"),
        ({"on_destination_error": "stop"}, "--on-destination-error stop is not known here; write degrade or"),
        ({"on_source_error": "panic"}, "--on-source-error panic is not known here; write report or switch"),
        ({"destination_timeout_s": 0}, "--destination-timeout"),
        ({"destination_timeout_s": float("nan")}, "--destination-timeout"),
        ({"stop_timeout_s": 1e9}, "--stop-timeout"),
        ({"copy_depth": 0}, "--copy-depth"),
        ({"poll_us": 10_001}, "--poll-us"),
        ({"threads": 0}, "--threads"),
        ({"threads": 17}, "--threads"),
        ({"dirty_region_bytes": 65537}, "power of two"),
        ({"dirty_region_bytes": 512}, "--dirty-region-size"),
        ({"log_format": "xml"}, "--log-format"),
        ({"log_level": "chatty"}, "--log-level"),
    ],
)
def test_each_wrong_value_is_a_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        make(**given)
    assert str(caught.value).endswith(".")


def test_a_socket_that_was_inherited_has_a_control_socket_only_if_one_is_named() -> None:
    assert make(socket_path=None, fd=3).control_socket is None
    assert make(socket_path=None, fd=3, control_path=Path("/c")).control_socket == Path("/c")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("/run/m.sock", Path("/run/m.sock")),
        ("unix:/run/m.sock", Path("/run/m.sock")),
        ("127.0.0.1:9100", TcpAddress("127.0.0.1", 9100)),
        ("[::1]:0", TcpAddress("::1", 0)),
        ("0.0.0.0:9100", TcpAddress("0.0.0.0", 9100)),
        ("[2001:db8::7]:9100", TcpAddress("2001:db8::7", 9100)),
    ],
)
def test_places_for_metrics(text: str, place: Path | TcpAddress) -> None:
    assert parse_metrics(text) == place


@pytest.mark.parametrize(
    "text", ["127.0.0.1:99999", "localhost:1", "9100", ":9100", "127.0.0.1:", "host.example:9100"]
)
def test_places_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_metrics(text)


@pytest.mark.parametrize(
    "given",
    [
        {"name": "b.img"},
        {"name": "/b\0"},
        {"name": "/b", "cache": "x"},
        {"name": "/b", "speed_bytes_per_s": -1},
        {"name": "iscsi://host/x"},
    ],
)
def test_a_wrong_destination_is_a_sentence(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\.$"):
        MirrorTarget(**given)


def test_the_limits_are_the_engines() -> None:
    header = (Path(__file__).parents[2] / "c_shim" / "shim_api.h").read_text()
    limits = {name: int(value) for name, value in re.findall(r"(VS_\w+) = (\d+)", header)}
    assert limits["VS_MAX_QUEUES"] == config.QUEUES_MAX
    assert limits["VS_REQUEST_BYTES_MAX"] == config.REQUEST_BYTES_MAX
    assert limits["VS_SERIAL_BYTES"] == config.SERIAL_BYTES_MAX
    assert limits["VS_POLL_AUTO"] == config.POLL_AUTO
    assert limits["VS_THREADS_MAX"] == config.THREADS_MAX
    assert limits["VS_EXTENTS_MIN"] == config.AL_EXTENTS_MIN
    assert limits["VS_EXTENTS_MAX"] == config.AL_EXTENTS_MAX
    assert limits["VS_DIRTY_REGION_BYTES_MAX"] == config.DIRTY_REGION_BYTES_MAX


def test_a_disk_of_a_group_that_freezes_listens_where_the_others_look() -> None:
    """Else each would be let go of by itself, and nobody would know before."""
    named: dict[str, Any] = {"name": "vm1-data", "group_freeze": True}
    for elsewhere in (None, Path("/run/other"), Path("/run/vm1-log/control")):
        with pytest.raises(ConfigError, match="look for this one's control socket by its name"):
            make(**named, control_path=elsewhere)
    make(**named, control_path=Path("/run/vm1-data/control"))
    assert ServeConfig(**named).control_socket is not None
