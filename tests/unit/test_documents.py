# SPDX-License-Identifier: Apache-2.0
"""What documents and comments cite is there, and tables are whole."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILES = [
    path
    for folder in ("c_shim", "vhostsync", "tests", "bench", "docs", "qemu-configs")
    for path in (ROOT / folder).rglob("*.*")
]
FILES += ROOT.glob("*.*")
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


def named(name: str) -> list[Path]:
    """The files that a document means by a name, with or without folders before it."""
    return [path for path in FILES if f"/{path.relative_to(ROOT)}".endswith(f"/{name}")]


def says(path: Path, name: str) -> bool:
    """`Class.method` and `disk.field` are looked for by their last part."""
    return re.search(rf"\b{name.rpartition('.')[2]}\b", path.read_text()) is not None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_cited_exist(document: Path) -> None:
    text = document.read_text()
    cited = set(re.findall(r"(?<![\w./<-])((?:[\w-]+/)*[\w-]+\.(?:c|h|py|md|sh|pml))\b(?!\()", text))
    assert [name for name in sorted(cited) if not named(name)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_name_that_is_cited_in_a_file_is_there(document: Path) -> None:
    """`name` in `file.c`, `name` (`file.c`). Of several names before a file, the last."""
    text = re.sub(r"\s+", " ", document.read_text())
    missing = [
        f"{name} in {file}"
        for name, file in re.findall(r"`([\w.]+)` (?:in |\()`([\w/]+\.(?:c|h|py))`", text)
        if not re.search(r"\.(c|h|py)$", name) and not any(says(path, name) for path in named(file))
    ]
    assert missing == []


def test_functions_of_the_way_of_a_write_are_in_the_files_beside_them() -> None:
    rows = re.findall(r"^\| \d+\. .*", (ROOT / "docs/write-path.md").read_text(), re.MULTILINE)
    assert rows
    missing = []
    for row in rows:
        _, step, files, functions, *_ = re.split(r" ?\| ?", row)
        there = [path for file in re.findall(r"`([\w/]+\.\w+)`", files) for path in named(file)]
        for name in re.findall(r"`([\w.]+)`", functions):
            if not any(says(path, name) for path in there):
                missing.append(f"{step}: {name}")
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_that_are_cited_exist(document: Path) -> None:
    missing = []
    for file, name in re.findall(r"\b((?:tests/\w+/)?test_\w+\.(?:py|c))::(\w+)", document.read_text()):
        path = ROOT / (file if "/" in file else f"tests/model/{file}")
        if not path.exists() or not says(path, name):
            missing.append(f"{file}::{name}")
    assert missing == []


def test_the_list_of_a_pass_is_whole_and_in_order() -> None:
    body = re.search(r"^static void pass\(.*?^}", (ROOT / "c_shim/engine/engine.c").read_text(), re.M | re.S)
    assert body is not None
    calls = re.findall(r"\b(\w+_pump|queues_notify|attachments_check_\w+)\(", body[0])
    document = (ROOT / "docs/write-path.md").read_text()
    listed = document[document.index("Each pass of its loop") :]
    listed = listed[: listed.index("The guest is told")]
    assert re.findall(r"\b(\w+_pump|queues_notify|attachments_check_\w+)\b", listed) == calls
