# SPDX-License-Identifier: Apache-2.0
"""What people are shown: sizes, durations, bars, the line of a mirror, events."""

import io
from typing import Any

import pytest

from tests.sizes import GIB
from tests.unit.control_fakes import status
from vhostsync.cli import show
from vhostsync.printable import size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (1048575, "1.0 MiB"),
        (1 << 40, "1.0 TiB"),
        (1 << 70, "1024.0 EiB"),
    ],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (95, "1 min 35 s"), (3700, "1 h 1 min")]
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert show.duration(seconds) == text


def test_a_bar_is_full_only_at_the_end() -> None:
    assert show.bar(0, 10, 12) == "[----------]"
    assert show.bar(999, 1000, 12) == "[#########-]"
    assert show.bar(10, 10, 12) == "[##########]"
    assert show.bar(0, 0, 12) == "[##########]"


def mirror(**changes: Any) -> dict[str, Any]:
    base = {name.replace("_", "-"): value for name, value in vars(status()).items()}
    return {**base, **{name.replace("_", "-"): value for name, value in changes.items()}}


def test_a_hundred_percent_means_all() -> None:
    line = show.copy_line(mirror(copy_bytes_total=10**6, copy_bytes_done=10**6 - 1))
    assert line.startswith("99.9 %")
    assert "estimating" in line
    assert show.copy_line(mirror()).startswith("100.0 %")


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_a_line_fits_its_terminal_if_it_can(width: int) -> None:
    line = show.copy_line(mirror(copy_bytes_total=GIB, copy_bytes_done=5, copy_remaining_s=5), width)
    assert len(line) < max(width, 70)


def test_a_degraded_mirror_says_why() -> None:
    line = show.mirror_line(mirror(state="degraded", destination="/b", worth="outdated", reason="it hung"))
    assert line.startswith("degraded  /b is outdated: it hung; lag")


def test_without_a_terminal_lines_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("vhostsync.cli.show.time.monotonic", lambda: now)
    out = io.StringIO()
    live = show.Live(out)
    for number in range(20):
        now += 1
        live.update(f"line {number}")
    live.say("event")
    live.end_line("end")
    assert out.getvalue().splitlines() == ["line 0", "line 5", "line 10", "line 15", "event", "end"]


def test_on_a_terminal_the_line_stays_below_what_is_said() -> None:
    out = io.StringIO()
    live = show.Live(out, terminal=True)
    live.update("one")
    live.update("one")
    live.say("event")
    live.end_line()
    assert out.getvalue() == "\rone\x1b[K\revent\x1b[K\none\rone\x1b[K\n"


def test_events_for_people() -> None:
    line = show.event_text(
        {
            "event": "IO_ERROR",
            "data": {"disk": "source", "x": None},
            "timestamp": {"seconds": 0, "microseconds": 0},
        }
    )
    assert line.endswith("  io error: disk source")


def test_values_of_events_for_people() -> None:
    """No word of Python's or JSON's."""
    bad = [{"offset": 4096, "length": 512}, {"offset": 8192, "length": 512}]
    line = show.event_text(
        {
            "event": "SWITCH_COMPLETED",
            "data": {"force": True, "paused": False, "accepted": {"doubt": [], "unreadable": bad}},
            "timestamp": {"seconds": 0, "microseconds": 0},
        }
    )
    assert line.endswith(
        "switch completed: force yes, paused no, accepted doubt none unreadable offset 4096 length 512; "
        "offset 8192 length 512"
    )
