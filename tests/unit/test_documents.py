# SPDX-License-Identifier: Apache-2.0
"""What documents and comments cite is there, and tables are whole."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path
    for folder, pattern in (("c_shim", "**/*.[ch]"), ("vhostsync", "**/*.py"), ("tests", "**/*.py"))
    for path in sorted((ROOT / folder).glob(pattern))
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_table_is_broken_by_a_blank_line(document: Path) -> None:
    lines = document.read_text().splitlines()
    # A table begins with its head and the line of dashes below it.
    broken = [
        number
        for number, line in enumerate(lines[1:-1], 1)
        if line.startswith("|") and not lines[number - 1].startswith("|")
        and not re.fullmatch(r"[| :-]+", lines[number + 1])
    ]  # fmt: skip
    assert broken == []


def test_what_is_made_from_the_code_is_up_to_date() -> None:
    subprocess.run([sys.executable, ROOT / "docs/generate.py", "--check"], check=True)


def test_headings_that_are_cited_exist() -> None:
    cited = re.compile(r'(?:docs/)?(\w[\w-]*\.md)(?:\]\([^)]*\))?, "([^"]+)"')
    for path in [*SOURCES, *DOCUMENTS]:
        for name, heading in cited.findall(re.sub(r"\s*\n[ #*]*", " ", path.read_text())):
            text = (ROOT / "docs" / name).read_text() if (ROOT / "docs" / name).exists() else ""
            headings = re.findall(r"^(?:#+ (?:\d+\. )?|\*\*)(.*)$", text, re.MULTILINE)
            assert any(each.startswith(heading) for each in headings), f"{path}: {name} has no {heading!r}"


def test_sources_that_comments_cite_exist() -> None:
    there = {path.name for path in (ROOT / "c_shim").rglob("*.[ch]")}
    for path in (ROOT / "c_shim").rglob("*.[ch]"):
        for comment in re.findall(r"/\*.*?\*/", path.read_text(), re.DOTALL):
            for name in re.findall(r"\b(\w+\.[ch])\b", comment):
                assert name in there or f"/{name}" in comment, f"{path.name} cites {name}"


def test_c_files_that_are_cited_by_path_exist() -> None:
    for path in [*SOURCES, *DOCUMENTS]:
        for cited in re.findall(r"\bc_shim/[\w/]+\.[ch]\b", path.read_text()):
            assert (ROOT / cited).exists(), f"{path} cites {cited}"


def test_the_list_of_a_pass_is_whole_and_in_order() -> None:
    body = re.search(r"^static void pass\(.*?^}", (ROOT / "c_shim/engine/engine.c").read_text(), re.M | re.S)
    assert body is not None
    calls = re.findall(r"\b(\w+_pump|queues_notify|attachments_check_\w+)\(", body[0])
    document = (ROOT / "docs/write-path.md").read_text()
    listed = document[document.index("Each pass of its loop") :]
    listed = listed[: listed.index("The guest is told")]
    assert re.findall(r"\b(\w+_pump|queues_notify|attachments_check_\w+)\b", listed) == calls
