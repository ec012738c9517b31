# SPDX-License-Identifier: Apache-2.0
"""`--update-docs`: docs/performance.md and the pictures are written from results, so that no figure there is
typed by hand. A section lies between <!-- bench: NAME --> and <!-- bench: end -->.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.calibrate import calibration_table
from bench.growth import growth_tables
from bench.report import table
from bench.sample import BenchError

TOP = Path(__file__).resolve().parent.parent
DOCUMENT = TOP / "docs" / "performance.md"
PICTURES = TOP / "docs" / "pictures"
Json = dict[str, Any]

# Section of the results -> its Markdown. The others (the timeline) are pictures alone.
TEXT: dict[str, Callable[[Json], str]] = {
    "table": table,
    "growth": growth_tables,
    "calibration": calibration_table,
}


def text_of(results: Json) -> str:
    titles = {"table": "# Side by side", "growth": "# Growth", "calibration": "# The load generator"}
    parts = [f"{titles[name]}\n\n{write(results[name])}" for name, write in TEXT.items() if name in results]
    return "\n".join(parts)


def with_sections(document: str, results: Json) -> str:
    """The document with each section that the results have anew; the others stay."""
    for name, write in TEXT.items():
        if name not in results:
            continue
        begin, end = f"<!-- bench: {name} -->\n", "<!-- bench: end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(document)) != 1:
            raise BenchError(f"there is not one section {begin.strip()} … {end} to write to")
        before, after = pattern.split(document)
        document = f"{before}{begin}{write(results[name])}{end}{after}"
    return document


def update_document(results: Json) -> None:
    DOCUMENT.write_text(with_sections(DOCUMENT.read_text(), results))
