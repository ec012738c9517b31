# SPDX-License-Identifier: Apache-2.0
"""Manual pages and completions, which are made from the commands and options that there are."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from docs.completions import SHELLS, completion
from docs.manual_pages import commands, escaped, pages
from vhostsync.cli.arguments import make_parser
from vhostsync.config import ServeConfig
from vhostsync.option import options_of

NAMES = [prog for prog, _, _ in commands(make_parser())]


def test_each_command_has_a_page_and_those_below_it_too() -> None:
    assert {"vhostsync", "vhostsync serve", "vhostsync mirror start"} <= set(NAMES)
    assert set(pages()) == {f"{name.replace(' ', '-')}.1" for name in NAMES}


def test_a_page_has_every_option_with_what_the_documents_say_of_it() -> None:
    page = re.sub(r"\s+", " ", pages()["vhostsync-serve.1"])
    for _, option in options_of(ServeConfig):
        assert rf"\fB{escaped(option.flag)}\fR" in page
        assert re.sub(r"\s+", " ", escaped(option.detail)) in page


def test_a_line_that_looks_like_a_request_is_none() -> None:
    assert escaped(".so /etc/x\n'quoted' a-b\\n") == "\\&.so /etc/x\n\\&'quoted' a\\-b\\en"


@pytest.mark.parametrize("name", sorted(pages()))
def test_a_page_is_well_formed(name: str, tmp_path: Path) -> None:
    if shutil.which("mandoc") is None:
        pytest.skip("NOT TESTED: manual pages as mandoc reads them; apt install mandoc")
    (tmp_path / name).write_text(pages()[name])
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", tmp_path / name], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_takes_its_completions(shell: str) -> None:
    text = completion(shell)
    for name in NAMES:
        assert name.split()[-1] in text
    if shutil.which(shell) is None:
        pytest.skip(f"NOT TESTED: the completions as {shell} reads them; apt install {shell}")
    subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_words_paths_and_values_are_completed(tmp_path: Path) -> None:
    (tmp_path / "vhostsync.bash").write_text(completion("bash"))
    (tmp_path / "disk.img").touch()

    def completed(*words: str) -> set[str]:
        quoted = " ".join(f"'{word}'" for word in words)
        script = (
            f". ./vhostsync.bash; COMP_WORDS=(vhostsync {quoted}); COMP_CWORD={len(words)}; "
            '_shtab_vhostsync; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        return set(subprocess.check_output(["bash", "-c", script], cwd=tmp_path, text=True).split())

    assert completed("mirror", "") == {"start", "cancel", "speed"}
    assert completed("serve", "--on-congestion", "") == {"block", "pull-ahead"}
    assert completed("serve", "--blk-file", "di") == {"disk.img"}
    assert completed("mirror", "start", "di") == {"disk.img"}
