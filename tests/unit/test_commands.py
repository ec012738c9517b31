# SPDX-License-Identifier: Apache-2.0
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.control_fakes import FakeBackend, status
from vhostsync.control import qmp
from vhostsync.control.command import ArgumentError
from vhostsync.control.commands import COMMANDS, dispatcher
from vhostsync.control.qmp import Request

pytestmark = pytest.mark.anyio


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


async def ask(backend: FakeBackend, command: str, /, **arguments: Any) -> Any:
    request = Request(command, {name.replace("_", "-"): value for name, value in arguments.items()}, 1)
    message = json.loads(await dispatcher(backend, "writeback").execute(request))
    assert message.pop("id") == 1
    return message["return"] if "return" in message else message["error"]["desc"]


async def test_the_mirrors_names_have_dashes(backend: FakeBackend) -> None:
    mirror = await ask(backend, "query-mirror")
    assert mirror["counts"]["source-generation"] == 7
    assert "_" not in json.dumps(mirror)
    assert {"state", "worth", "lag-bytes", "copy-bytes-total", "last-error", "doubt"} <= set(mirror)


async def test_status_stats_and_version(backend: FakeBackend) -> None:
    assert (await ask(backend, "query-status"))["disk"] == "/disks/a.img"
    assert [queue["index"] for queue in (await ask(backend, "query-stats"))["queues"]] == [0, 1]
    assert await ask(backend, "query-version") == qmp.version()


async def test_a_start_hands_over_its_arguments(backend: FakeBackend) -> None:
    start = {"destination": "/b.img", "create": True, "cache": "none", "speed": 5}
    assert await ask(backend, "mirror-start", **start) == {}
    target = backend.mirror.target
    assert target is not None
    assert (target.name, target.create, target.cache, target.speed_bytes_per_s) == (
        "/b.img",
        True,
        "none",
        5,
    )


async def test_a_start_without_a_cache_takes_the_one_that_serve_was_told(backend: FakeBackend) -> None:
    await ask(backend, "mirror-start", destination="/b.img")
    assert backend.mirror.target is not None
    assert backend.mirror.target.cache == "writeback"
    assert not backend.mirror.target.create


async def test_a_switch_hands_over_its_arguments_and_returns_its_result(backend: FakeBackend) -> None:
    backend.mirror.now = status(state="steady", destination="/b.img")
    result = await ask(backend, "switch", deadline_ms=2500, max_pause_ms=7.5, keep_mirror=True)
    assert backend.mirror.switch_arguments == {"deadline_s": 2.5, "max_pause_ms": 7.5, "keep": True}
    assert result == {
        "pause-us": 1234,
        "attempts": 1,
        "source-path": "/b.img",
        "destination-path": None,
        "accepted": {},
    }
    assert not backend.mirror.accepts_unreadable


async def test_a_switch_tells_what_it_has_accepted(backend: FakeBackend) -> None:
    bad = {"offset": 4096, "length": 512}
    backend.mirror.now = status(state="steady", destination="/b.img", unreadable=(bad,))
    result = await ask(backend, "switch", accept_unreadable=True)
    assert backend.mirror.accepts_unreadable
    assert result["accepted"] == {"doubt": [], "unreadable": [bad]}


async def test_cancel_speed_and_quit(backend: FakeBackend) -> None:
    assert await ask(backend, "mirror-cancel") == "There is no mirror to cancel."
    await ask(backend, "mirror-start", destination="/b.img")
    assert await ask(backend, "mirror-set-speed", speed=9) == {}
    assert (await ask(backend, "query-mirror"))["speed-bytes-per-s"] == 9
    assert await ask(backend, "mirror-cancel", force=True) == {}
    assert backend.mirror.calls[-1] == "cancel True"
    assert await ask(backend, "quit") == {}
    assert backend.quit_force is False


@pytest.mark.parametrize(
    ("command", "arguments", "reason"),
    [
        ("mirror-start", {}, "Parameter 'destination' is missing"),
        ("mirror-start", {"destination": 1}, "Invalid parameter type for 'destination', expected: string"),
        ("mirror-start", {"destination": "/b", "x": 1}, "Parameter 'x' is unexpected"),
        (
            "mirror-start",
            {"destination": "/b", "create": 1},
            "Invalid parameter type for 'create', expected: boolean",
        ),
        (
            "mirror-start",
            {"destination": "/b", "speed": True},
            "Invalid parameter type for 'speed', expected: integer",
        ),
        (
            "mirror-start",
            {"destination": "/b", "speed": 1.0},
            "Invalid parameter type for 'speed', expected: integer",
        ),
        ("mirror-start", {"destination": "/b", "speed": -1}, "Parameter 'speed' expects a value from 0 to"),
        (
            "mirror-start",
            {"destination": "/b", "speed": 10**30},
            "Parameter 'speed' expects a value from 0 to",
        ),
        ("mirror-start", {"destination": "/b", "cache": "no"}, "Parameter 'cache' expects none or writeback"),
        ("mirror-start", {"destination": "b.img"}, "The destination 'b.img' must be an absolute path."),
        ("mirror-start", {"destination": ""}, "must be an absolute path."),
        ("mirror-start", {"destination": "/b\0"}, "zero byte"),
        ("switch", {"deadline-ms": 0}, "Parameter 'deadline-ms' expects a value from 1 to"),
        ("switch", {"max-pause-ms": None}, "Invalid parameter type for 'max-pause-ms', expected: number"),
        ("switch", {}, "The mirror is passthrough, not steady; the guest stays where it is."),
        ("query-status", {"x": 1}, "Parameter 'x' is unexpected"),
        ("nope", {}, "The command nope has not been found"),
    ],
)
async def test_what_does_not_fit_is_refused(
    backend: FakeBackend, command: str, arguments: dict[str, Any], reason: str
) -> None:
    assert reason in await ask(backend, command, **arguments)
    assert backend.mirror.target is None


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=2)
)
ARGUMENTS = st.sampled_from(
    ["x", *sorted({argument.name for command in COMMANDS.values() for argument in command.arguments})]
)


@given(st.sampled_from(sorted(COMMANDS)), st.dictionaries(ARGUMENTS, VALUES, max_size=3))
def test_whatever_is_given_is_checked_or_refused(name: str, given_arguments: Mapping[str, Any]) -> None:
    command = COMMANDS[name]
    try:
        checked = command.check(given_arguments)
    except ArgumentError as error:
        assert "Parameter" in str(error) or "parameter" in str(error)
    else:
        assert set(checked) == {argument.name for argument in command.arguments}
        assert set(given_arguments) <= set(checked)


async def test_query_commands_tells_each_with_its_arguments(backend: FakeBackend) -> None:
    rows = {row["name"]: row for row in await ask(backend, "query-commands")}
    assert set(rows) == set(COMMANDS)
    assert rows["mirror-start"]["arguments"][0] == {
        "name": "destination",
        "type": "string",
        "required": True,
        "help": "Absolute path of an image file or a block device.",
    }
    assert all(row["help"].endswith(".") for row in rows.values())


def test_the_document_has_every_command_and_argument() -> None:
    text = (Path(__file__).parents[2] / "docs" / "control-protocol.md").read_text()
    for command in COMMANDS.values():
        section = re.search(rf"^### {command.name}$(.*?)(?=^##|\Z)", text, re.M | re.S)
        assert section is not None, command.name
        assert command.help in section[1], command.name
        for argument in command.arguments:
            assert f"| `{argument.name}` | {argument.type} |" in section[1], (command.name, argument.name)
            assert argument.help in section[1], (command.name, argument.name)
