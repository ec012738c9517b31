# SPDX-License-Identifier: Apache-2.0
"""Limits as words and as the arguments of block_set_io_throttle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostsync.errors import ConfigError
from vhostsync.limits import (
    KINDS,
    NO_LIMIT,
    NO_LIMITS,
    RATE_MAX,
    Limits,
    Rate,
    bytes_rate_text,
    parse_bytes_rate,
    parse_requests_rate,
    requests_rate_text,
)


@st.composite
def rates(draw: st.DrawFn) -> Rate:
    per_s = draw(st.integers(0, RATE_MAX))
    burst = draw(st.integers(per_s, RATE_MAX)) if per_s and draw(st.booleans()) else 0
    return Rate(per_s, burst, draw(st.integers(1, RATE_MAX // burst)) if burst else 1)


def limits() -> st.SearchStrategy[Limits]:
    sizes = st.integers(0, RATE_MAX)
    return st.builds(Limits, **{kind: rates() for kind in KINDS}, iops_size=sizes)


@given(rates())
def test_what_is_written_is_read_back(rate: Rate) -> None:
    assert parse_bytes_rate(bytes_rate_text(rate)) == rate
    assert parse_requests_rate(requests_rate_text(rate)) == rate


@given(limits(), limits())
def test_what_is_shown_sets_it(now: Limits, wanted: Limits) -> None:
    assert now.changed(wanted.shown()) == wanted


@given(limits())
def test_what_is_not_named_stays(now: Limits) -> None:
    assert now.changed({}) == now
    assert now.changed(dict.fromkeys(now.shown())) == now  # as the control socket fills arguments in
    changed = now.changed({"bps_wr": 7})
    assert changed.bps_wr == Rate(7)
    assert all(changed.rates()[kind] == now.rates()[kind] for kind in KINDS if kind != "bps_wr")
    assert changed.iops_size == now.iops_size
    assert now.changed({"iops_rd": 7}).iops_size == 0


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("none", NO_LIMIT),
        ("0", NO_LIMIT),
        ("100M", Rate(100 << 20)),
        ("1.5G/s", Rate(3 << 29)),
        ("100M/s:1G/s", Rate(100 << 20, 1 << 30)),
        ("100M:1G:2m", Rate(100 << 20, 1 << 30, 120)),
    ],
)
def test_rates_of_bytes(text: str, rate: Rate) -> None:
    assert parse_bytes_rate(text) == rate


@pytest.mark.parametrize(
    "text",
    ["", "x", "-1", "1:", "1:2:", "1:2:3:4", "2:1", "0:5", "1:2:0", "1:2:0.5", "1::5", "2:0:3", "1:2:x",
     "none:5", f"{RATE_MAX + 1}", f"1:{RATE_MAX}:2"],
)  # fmt: skip
def test_what_is_no_rate(text: str) -> None:
    for parse in (parse_bytes_rate, parse_requests_rate):
        with pytest.raises(ConfigError):
            parse(text)


def test_requests_are_whole() -> None:
    assert parse_requests_rate("500:2000:10s") == Rate(500, 2000, 10)
    for text in ("1K", "1.5", "٣"):
        with pytest.raises(ConfigError):
            parse_requests_rate(text)


@pytest.mark.parametrize(
    "wrong",
    [{"bps_max": 5}, {"bps_max_length": 5}, {"bps": 10, "bps_max": 5}, {"iops": 1, "iops_max_length": 2},
     {"iops": 1, "iops_max": 2, "iops_max_length": 0}, {"bps": 0, "bps_max": 2}],
)  # fmt: skip
def test_a_burst_belongs_to_a_limit(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"bps|iops"):
        NO_LIMITS.changed(wrong)


def test_words_for_people() -> None:
    assert NO_LIMITS.words() == {}
    now = Limits(bps=Rate(1 << 20, 2 << 20, 10), iops_wr=Rate(5), iops_size=4096)
    assert now.words() == {"bps": "1M:2M:10s", "iops_wr": "5", "iops_size": "4K"}
