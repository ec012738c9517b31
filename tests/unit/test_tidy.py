# SPDX-License-Identifier: Apache-2.0
"""The house is kept: lines, functions and files that can be read, names that say what, and no dead file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("c_shim", "vhostsync", "bench", "tests", "docs")
PYTHON = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
C = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.[ch]"))

C_LINE_CHARACTERS = 120  # that of Python is ruff's
FILE_LINES = 500
TEST_FILE_LINES = 600
FUNCTION_LINES = 60
TEST_FUNCTION_LINES = 80

# Data: the longer, the better.
TABLES = {
    "mutation_list.py": "every seeded fault of the C code, one after the other",
}

NEED_A_NOUN = {"begin", "check", "finish"}


def is_test(path: Path) -> bool:
    return path.is_relative_to(ROOT / "tests")


@cache
def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions_of_python(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def functions_of_c(path: Path) -> Iterator[tuple[str, int]]:
    """A definition begins at the margin and ends there; whatever else does so has a `;` or an `=`."""
    head, begins_at = "", 0
    for number, line in enumerate(lines(path), 1):
        if line.startswith("}") and "(" in head:
            name = re.search(r"(\w+)\(", head)
            assert name is not None
            yield name[1], number - begins_at + 1
        if line.startswith("{"):
            continue
        if re.match(r"[a-zA-Z_]", line):
            head, begins_at = line, number
        if (line.endswith(";") and not line.startswith((" ", "\t"))) or "=" in head:
            head = ""


def functions(path: Path) -> Iterator[tuple[str, int]]:
    return functions_of_python(path) if path.suffix == ".py" else functions_of_c(path)


def test_lines_of_c_are_short() -> None:
    long = {path.name for path in C if any(len(line) > C_LINE_CHARACTERS for line in lines(path))}
    assert long == set()


def test_files_are_short() -> None:
    long = {
        path.name
        for path in [*PYTHON, *C]
        if len(lines(path)) > (TEST_FILE_LINES if is_test(path) else FILE_LINES)
    }
    assert long == TABLES.keys()


def test_functions_fit_a_screen() -> None:
    long = {
        f"{path.name}: {name}"
        for path in [*PYTHON, *C]
        for name, count in functions(path)
        if count > (TEST_FUNCTION_LINES if is_test(path) else FUNCTION_LINES)
    }
    assert long == set()


def test_names_say_what_is_done_to_what() -> None:
    """A method has its object: `load.finish()`. A function needs the noun in its name."""
    bare = {f"{path.name}: {name}" for path in C for name, _ in functions(path) if name in NEED_A_NOUN}
    bare |= {
        f"{path.name}: {node.name}"
        for path in PYTHON
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.strip("_") in NEED_A_NOUN
    }
    assert bare == set()


def test_every_file_opens_with_what_it_is() -> None:
    opening = r'/\* SPDX[^\n]*\n \*\n \* \S|# SPDX[^\n]*\n"""\S'
    silent = [
        str(path.relative_to(ROOT))
        for path in [*PYTHON, *C]
        if path.relative_to(ROOT).parts[0] in ("c_shim", "vhostsync")
        and not re.match(opening, path.read_text())
    ]
    assert silent == []


# ---- dead files ----


def imported(path: Path) -> Iterator[str]:
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            of = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*of, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{each.name}" for each in node.names)


def test_every_python_file_is_used() -> None:
    used = {name for path in PYTHON for name in imported(path)}
    hooks_of_the_site = (ROOT / "mkdocs.yml").read_text()
    dead = [
        str(path.relative_to(ROOT))
        for path in PYTHON
        if ".".join(path.relative_to(ROOT).with_suffix("").parts) not in used
        and not path.name.startswith("test_")
        and path.name not in {"__init__.py", "__main__.py", "conftest.py"}
        and 'if __name__ == "__main__":' not in lines(path)
        and str(path.relative_to(ROOT)) not in hooks_of_the_site
    ]
    assert dead == []


def test_every_c_file_of_tests_and_bench_is_built() -> None:
    """Those of c_shim: test_c_floors.py."""
    dead = [
        str(path.relative_to(ROOT))
        for path in C
        if path.suffix == ".c" and not path.is_relative_to(ROOT / "c_shim") and not is_built(path)
    ]
    assert dead == []


def is_built(path: Path) -> bool:
    recipe = path.parent / "meson.build"
    if not recipe.exists():  # a program of the test guest
        return f'"{path.stem}"' in (path.parent / "assets.py").read_text()
    # A list may name it without what all its names have in common.
    text = recipe.read_text()
    bare = path.stem.removeprefix("test_").removeprefix("fuzz_")
    return any(f"'{name}'" in text for name in (path.name, bare))


def test_every_header_is_included() -> None:
    include = re.compile(r'^\s*#\s*include "(?:.*/)?(.+)"', re.MULTILINE)
    included = {name for path in C for name in include.findall(path.read_text())}
    built_in = (ROOT / "c_shim/meson.build").read_text()  # what the generated binding is made from
    headers = {path.name for path in C if path.suffix == ".h" and f"'{path.name}'" not in built_in}
    assert headers - included == set()


@pytest.mark.parametrize("suffix", ["sh", "pml", "toml"])
def test_every_other_file_of_tests_is_named(suffix: str) -> None:
    tests = ROOT / "tests"
    readers = [*PYTHON, ROOT / "run", *tests.rglob("*.sh"), *tests.rglob("*.pml")]
    text = "\n".join(path.read_text() for path in readers)
    assert [path.name for path in tests.rglob(f"*.{suffix}") if path.name not in text] == []
