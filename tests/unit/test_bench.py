# SPDX-License-Identifier: Apache-2.0
"""How the bench judges and prints: of figures made up here."""

from pathlib import Path
from typing import Any

import pytest

from bench.documents import DOCUMENT, TEXT, with_sections
from bench.pictures import PICTURES, percentile_curve
from bench.results import LINES, readme_table, results, save
from bench.rows import ROWS, Outcome
from bench.sample import BenchError, Sample
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


def measured(per_s: float, ratio: float, rival: str = "10.0.13", number: str = "5") -> dict[str, Any]:
    """A table of one row."""
    spread = {"median": per_s, "least": per_s / 2, "greatest": per_s * 2}
    row: dict[str, Any] = {
        "number": number, "title": "mirrored", "place": "memory", "figure": "per_s", "unit": "per second",
        "failure": None, "shown": {"ours mirrored": spread, "rival blocking": {**spread, "median": 1000.0}},
        "targets": [{"target": "of rival's best ≥ 6", "values": [ratio], "value": ratio, "met": False}],
        "rounds": [{"ours mirrored": {"figures": {}, "detail": {}}}],
    }  # fmt: skip
    machine = {
        "date": "2026-11-29 03:00 UTC", "processor": "X, 2 cores", "kernel": "6.1", "vhostsync": "abc",
        "rival": f"qemu-storage-daemon version {rival} (Debian)",
    }  # fmt: skip
    return {"machine": machine, "method": {"rounds": 5}, "rows": [row]}


def test_results_are_kept_by_machine_and_row(tmp_path: Path) -> None:
    save(measured(100.0, 3.0), "one", tmp_path)
    save(measured(70.0, 2.0, number="4"), "one", tmp_path)
    save(measured(200.0, 4.0), "one", tmp_path)  # row 5 anew
    save(measured(300.0, 2.5), "two", tmp_path)
    found = {(each.machine, each.row["number"]): each.median("ours mirrored") for each in results(tmp_path)}
    assert found == {("one", "5"): 200.0, ("one", "4"): 70.0, ("two", "5"): 300.0}
    assert "rounds" not in (tmp_path / "one.json").read_text().replace('"rounds": 5', "")


def test_a_table_of_several_machines_has_ranges(tmp_path: Path) -> None:
    save(measured(200.0, 4.0), "one", tmp_path)
    save(measured(300.0, 2.5), "two", tmp_path)
    table = readme_table(results(tmp_path))
    work = next(line.work for line in LINES if line.number == "5")
    assert f"| {work} | 200 to 300/s | 1000/s | 2.50 to 4.00 |  |" in table
    assert "* one: X, 2 cores, Linux 6.1, QEMU 10.0.13; vhostsync abc, 2026-11-29" in table
    assert "* two: " in table


def test_an_older_rival_says_nothing_of_a_newer_one(tmp_path: Path) -> None:
    save(measured(200.0, 4.0, rival="7.2.22"), "one", tmp_path)
    assert len(results(tmp_path)) == 1
    save(measured(300.0, 2.5), "two", tmp_path)
    assert [each.machine for each in results(tmp_path)] == ["two"]


def test_being_ahead_is_claimed_only_where_the_disk_is_not_the_limit() -> None:
    places = {row.number: row.place for row in ROWS}
    assert {places[line.number] for line in LINES if line.of_rival is not None} == {"memory"}
    assert all(row.unit for row in ROWS)


def test_a_machine_has_a_name_that_fits_a_file(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no name for a machine"):
        save(measured(1.0, 1.0), "../x", tmp_path)
