# SPDX-License-Identifier: Apache-2.0
"""The count check, exhaustively over small values (docs/durability.md, section 2)."""

from __future__ import annotations

from itertools import product

from vhostsync._shim import lib

SMALL = range(9)


def test_every_row_of_the_table() -> None:
    for request, mirrored, flushed in product(SMALL, SMALL, SMALL):
        if flushed > mirrored:
            continue  # F <= M always
        if request <= flushed:
            expected = lib.VS_CHECK_HELD
        elif request <= mirrored:
            expected = lib.VS_CHECK_FLUSH
        else:
            expected = lib.VS_CHECK_WAIT
        assert lib.vs_count_check(request, mirrored, flushed) == expected, (request, mirrored, flushed)


def test_the_counts_are_unsigned_and_wide() -> None:
    top = (1 << 64) - 1
    assert lib.vs_count_check(top, top, top) == lib.VS_CHECK_HELD
    assert lib.vs_count_check(top, top, top - 1) == lib.VS_CHECK_FLUSH
    assert lib.vs_count_check(top, top - 1, top - 1) == lib.VS_CHECK_WAIT
    assert lib.vs_count_check(1 << 32, (1 << 32) - 1, 0) == lib.VS_CHECK_WAIT


def test_a_request_is_only_ever_let_go_when_the_destination_holds_it() -> None:
    """The order of the three answers follows R: raising R never makes the answer weaker."""
    order = {lib.VS_CHECK_HELD: 0, lib.VS_CHECK_FLUSH: 1, lib.VS_CHECK_WAIT: 2}
    for mirrored, flushed in product(SMALL, SMALL):
        if flushed > mirrored:
            continue
        answers = [order[lib.vs_count_check(request, mirrored, flushed)] for request in SMALL]
        assert answers == sorted(answers)
