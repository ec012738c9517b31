# SPDX-License-Identifier: Apache-2.0
"""Every interleaving of the protocol's models (README.md here), and the bugs that the check must find."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DEPTH_MAX = 20_000
MEMORY_MIB = 1500
# COLLAPSE keeps states small; NOREDUCE: each interleaving is looked at; NFAIR: processes under weak fairness.
COMPILE = ("-w", "-DCOLLAPSE", "-DNOREDUCE", "-DSAFETY", f"-DMEMLIM={MEMORY_MIB}")
COMPILE_LIVENESS = (*(flag for flag in COMPILE if flag != "-DSAFETY"), "-DNFAIR=4")


@dataclass(frozen=True)
class Model:
    name: str
    file: str
    defines: tuple[str, ...] = ()
    liveness: bool = False  # looks for a cycle in which a flush is never answered, under weak fairness
    bugs: tuple[str, ...] = ()  # those that the check of this model has to find


MODELS = (
    Model(
        "order",
        "order.pml",
        bugs=("RULE_1", "RULE_2_SOURCE", "RULE_2_DESTINATION", "RULE_9", "RULE_9_BLOCK"),
    ),
    Model("flush", "flush.pml", bugs=("F_AT_END", "SOURCE_FLUSHED_AT_END", "RECORD_LATE")),
    Model("flush-source-fails", "flush.pml", ("WRITES=2", "SOURCE_MAY_FAIL")),
    Model("flush-log-of-one", "flush.pml", ("WRITES=2", "LOG_ROOM=1"), bugs=("RULE_6",)),
    Model("flush-is-answered", "flush.pml", ("WRITES=2", "SILENCE", "LIVENESS"), True, ("RULE_7",)),
    Model(
        "copy",
        "copy.pml",
        bugs=("RULE_2_TURNS", "RULE_3", "JOIN", "RECORD_RESYNC", "RECORD_AHEAD"),
    ),
    Model(
        "dirty",
        "dirty.pml",
        bugs=(
            "RULE_2_TURNS",
            "RULE_4",
            "RULE_4_RECENT",
            "RULE_4_IN_FLIGHT",
            "RULE_4_FLUSH",
            "RULE_5",
            "RULE_8",
            "AHEAD",
        ),
    ),
    Model(
        "switch",
        "switch.pml",
        bugs=(
            "RULE_5_SWITCH",
            "SWITCH_GATE",
            "SWITCH_DRAIN",
            "SWITCH_ANNOUNCE",
            "SWITCH_MARK",
            "SWITCH_BACK",
            "SWITCH_COUNTS",
        ),
    ),
    Model(
        "threads",
        "threads.pml",
        bugs=("LAST_LOOK", "LOOK_BEFORE_PUT", "FENCE_SLEEP", "FENCE_WAKE", "RELEASE"),
    ),
)
BUGS = [(model, bug) for model in MODELS for bug in model.bugs]


@dataclass(frozen=True)
class Checked:
    errors: int
    states: int
    depth: int
    seconds: float
    violation: str
    trail: bool
    unreached: tuple[str, ...]
    output: str


def _number(pattern: str, output: str) -> float:
    found = re.search(pattern, output)
    assert found, f"spin's verifier did not finish:\n{output}"
    return float(found[1])


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def _need_spin() -> None:
    if shutil.which("spin"):
        return
    noted = Path(os.environ.get("VHOSTSYNC_CACHE", "")) / "packages-unavailable"  # by ./run
    if noted.is_file() and "spin" in noted.read_text().split():
        pytest.skip("the distribution has no package spin")
    pytest.fail("spin is not installed: apt-get install spin (./run test does it)", pytrace=False)


def check_model(model: Model, folder: Path, bug: str | None = None) -> Checked:
    """Runs the model, with one bug seeded, until all states were seen or the first error was."""
    _need_spin()
    defines = [f"-D{name}" for name in (*model.defines, *([f"BUG_{bug}"] if bug else []))]
    _run(["spin", *defines, "-a", str(HERE / model.file)], folder)
    optimise = "-O0" if bug else "-O2"  # a bug is found soon; compiling would take longer
    _run(["cc", optimise, *(COMPILE_LIVENESS if model.liveness else COMPILE), "-o", "pan", "pan.c"], folder)
    output = _run(["./pan", f"-m{DEPTH_MAX}", *(["-a", "-f"] if model.liveness else [])], folder)
    unreached = re.findall(r"^\t\S+, state \d+, (.*)$", output, re.M)
    violation = re.search(r"^pan:1: (.*)$", output, re.M)
    return Checked(
        errors=int(_number(r"errors: (\d+)", output)),
        states=int(_number(r"(\d+) states, stored", output)),
        depth=int(_number(r"depth reached (\d+)", output)),
        seconds=_number(r"elapsed time ([\d.]+) seconds", output),
        violation=violation[1] if violation else "",
        trail=any(folder.glob("*.trail")),
        unreached=tuple(text for text in unreached if text != '"-end-"'),
        output=output,
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_no_interleaving_breaks_the_promise(model: Model, tmp_path: Path) -> None:
    checked = check_model(model, tmp_path)
    print(
        f"spin {model.name}: {checked.states} states, depth {checked.depth}, {checked.seconds} s,"
        f" {checked.errors} errors"
    )
    assert checked.errors == 0, checked.violation
    assert not checked.trail
    assert "max search depth too small" not in checked.output
    assert "Search not completed" not in checked.output
    assert "out of memory" not in checked.output
    # A statement that no run reaches is a part of the protocol that was not checked.
    assert checked.unreached == ()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("model", "bug"), BUGS, ids=[f"{model.name}-{bug}" for model, bug in BUGS])
def test_a_seeded_bug_is_found(model: Model, bug: str, tmp_path: Path) -> None:
    checked = check_model(model, tmp_path, bug)
    assert checked.errors == 1
    assert checked.trail
    assert re.match(r"assertion violated|acceptance cycle", checked.violation), checked.output


def test_each_bug_in_the_models_is_run_and_each_rule_has_one() -> None:
    for file in HERE.glob("*.pml"):
        written = set(re.findall(r"BUG_(\w+)", file.read_text()))
        assert written == {bug for model, bug in BUGS if model.file == file.name}
    for rule in range(1, 10):
        assert any(re.match(rf"RULE_{rule}(_|$)", bug) for _, bug in BUGS), f"rule {rule} has no seeded bug"
