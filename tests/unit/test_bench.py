# SPDX-License-Identifier: Apache-2.0
"""How the bench judges and prints: of figures made up here."""

from typing import Any

from bench.documents import DOCUMENT, TEXT, with_sections
from bench.pictures import PICTURES, percentile_curve
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


def test_a_section_of_the_document_is_replaced_and_the_rest_stays() -> None:
    table = {
        "title": "Disks", "date": "today", "load": "0", "columns": ["disk", "start s"],
        "rows": [["1 GiB", 0.25], ["16 TiB", None]],
    }
    section = {"machine": {"kernel": "6"}, "method": {"seconds": 1.0, "bytes_of": {}}, "tables": [table]}
    first = "a\n<!-- bench: table -->\nkept\n<!-- bench: end -->\n<!-- bench: growth -->\n"
    after = with_sections(first + "old\n<!-- bench: end -->\nz\n", {"growth": section})
    assert after.startswith(first)
    assert after.endswith("<!-- bench: end -->\nz\n")
    assert "| 1 GiB | 0.25 |\n| 16 TiB | - |\n" in after
    assert "old" not in after
    assert with_sections(after, {"growth": section}) == after


def test_this_documents_sections_are_there_to_be_written() -> None:
    document = DOCUMENT.read_text()
    for name in TEXT:
        assert document.count(f"<!-- bench: {name} -->\n") == 1
    for picture in PICTURES:
        assert f"(pictures/{picture})" in document
        assert (DOCUMENT.parent / "pictures" / picture).exists()


def test_percentiles_are_of_all_rounds_together() -> None:
    def of(histogram: list[list[int]]) -> dict[str, Any]:
        return {"ours": {"detail": {"operations": {"write": {"histogram": histogram}}}}}

    row = {"rounds": [of([[1000, 90], [2000, 10]]), of([[1000, 90], [9000, 10]])]}
    assert percentile_curve(row, "ours") == [(1.0, 0.0), (2.0, 90.0), (9.0, 95.0)]
    assert percentile_curve(row, "raw") == []
