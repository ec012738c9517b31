# SPDX-License-Identifier: Apache-2.0
"""How the bench judges and prints: of figures made up here."""

from bench.rows import ROWS, Outcome
from bench.sample import Sample
from bench.targets import percentile_99


def test_a_percentile_over_switches_is_taken_over_all_of_them() -> None:
    """One bad switch in each round vanishes from the rounds' medians, not from the pauses of all."""
    row = next(row for row in ROWS if row.number == "9")
    one = {"ours mirrored": Sample({"pause_ms": 1.0}, {"pauses_ms": [1.0] * 20 + [9.0]})}
    outcome = Outcome(row, [one] * 5)
    judged = {str(target): target.over_rounds(target.values(outcome.rounds)) for target in row.targets}
    assert judged == {"median ms ≤ 1.5": 1.0, "p99 ms ≤ 4": 9.0}
    assert max(outcome.figures("ours mirrored")) == 9.0
    assert len(outcome.figures("ours mirrored")) == 105


def test_the_99th_percentile_is_the_nearest_rank() -> None:
    assert percentile_99([*range(100)]) == 98
    assert percentile_99([*range(99)]) == 98
    assert percentile_99([5]) == 5
