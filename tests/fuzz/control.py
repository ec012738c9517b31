# SPDX-License-Identifier: Apache-2.0
"""Conversations of unruly clients with the control socket's server, made from a number.

Requests that are mostly right, in pieces of any size, several clients' at once, with rubbish between them:
half a line, a line without end, nesting without end, NUL, bytes that are no UTF-8, arguments of any type.

What is required: every line that comes back is a reply or an event in good order, nothing in the server fails
in a way that nobody foresaw, and a good client is served afterwards.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import structlog.testing

from tests.unit.control_fakes import FakeBackend, running
from vhostsync.control.commands import COMMANDS
from vhostsync.control.qmp import DEPTH_MAX, MESSAGE_BYTES_MAX

PATIENCE_S = 30.0
# `quit` ends the server that the next one needs; an event log without end is not the client's doing.
USABLE = sorted(name for name in COMMANDS if name != "quit")
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 1 << 63, 1 << 200, 0.5, 1e300, "", "x", "/nowhere/disk.img", "\0", "\ud800",
    "\u20ac" * 40, [], [[]], {}, {"a": {}}, "none", "4096",
)  # fmt: skip
RUBBISH = (
    b"\0", b"\xff", b"\xc3\x28", b"{", b"}", b"[", b'"', b"\\", b"\n", b"\r\n\r\n", b"nonsense\n", b"12 34\n",
    b'{"execute": "query-status", "execute": "quit"}', b'{"execute": "\\ud800"}', b'{"execute": NaN}',
    b'{"execute": 1e999}', b'{"execute": ' + b"9" * 5000 + b"}", b"[" * (DEPTH_MAX + 1) + b"\n",
    b'{"a":' * (DEPTH_MAX - 1), b"{" * 20000, b'"' + b"x" * (MESSAGE_BYTES_MAX + 1) + b'"\n',
    b'{"execute": "' + b"y" * (MESSAGE_BYTES_MAX + 1) + b'"}\n', b'{"execute": "query-status"',
    b"\xed\xa0\x80",
)  # fmt: skip


def request(dice: random.Random) -> bytes:
    """Mostly one that exists, with some of its arguments, mostly of the right type."""
    command = COMMANDS[dice.choice(USABLE)]
    message: dict[str, Any] = {"execute": command.name if dice.randrange(20) else dice.choice(VALUES)}
    arguments = {each.name: dice.choice(VALUES) for each in command.arguments if dice.randrange(3)}
    if dice.randrange(12) == 0:
        arguments[dice.choice(("unheard-of", "", "\0"))] = dice.choice(VALUES)
    if arguments or dice.randrange(2):
        message["arguments"] = arguments if dice.randrange(20) else dice.choice(VALUES)
    if dice.randrange(2):
        message["id"] = dice.choice(VALUES)
    if dice.randrange(30) == 0:
        message["more"] = dice.choice(VALUES)
    return json.dumps(message).encode() + dice.choice((b"\n", b"\r\n", b"", b" "))


def conversation(dice: random.Random) -> bytes:
    said = [b'{"execute": "qmp_capabilities"}\n'] if dice.randrange(8) else []
    for _ in range(dice.randrange(12)):
        said.append(request(dice) if dice.randrange(4) else dice.choice(RUBBISH))
        if dice.randrange(15) == 0:
            damaged = bytearray(said[-1])
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
            said[-1] = bytes(damaged)
    return b"".join(said)


def check_lines(data: bytes, *, whole: bool) -> None:
    """What came back; the last line may lack its end where the client left first."""
    *lines, rest = data.split(b"\r\n")
    assert not whole or rest == b""
    for line in lines:
        message = json.loads(line)
        kinds = {"QMP", "return", "error", "event"} & set(message)
        assert len(kinds) == 1, f"neither one thing nor the other: {line[:200]!r}"
        if "error" in message:
            assert message["error"]["desc"]
            assert "Internal error" not in message["error"]["desc"], message


async def _read_all(stream: anyio.abc.ByteReceiveStream) -> bytes:
    data = b""
    with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
        while True:
            data += await stream.receive()
    return data


async def unruly(path: Path, seed: int) -> None:
    """One client: sends it all in pieces, and reads to the end, or leaves in the middle."""
    dice = random.Random(seed)
    data = conversation(dice)
    leaves = dice.randrange(6) == 0
    async with await anyio.connect_unix(path) as stream:
        read = b""

        async def listen() -> None:
            nonlocal read
            read = await _read_all(stream)

        async with anyio.create_task_group() as tasks:
            if not leaves:
                tasks.start_soon(listen)
            while data:
                size = dice.choice((1, 2, 7, 100, 4096, 20000)) if len(data) < 3000 else 20000
                piece, data = data[:size], data[size:]
                try:
                    await stream.send(piece)
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    break
            if not leaves:
                with suppress(anyio.BrokenResourceError, OSError):
                    await stream.send_eof()
    check_lines(read, whole=False)


async def good(path: Path) -> None:
    async with await anyio.connect_unix(path) as stream:
        await stream.send(b'{"execute": "qmp_capabilities"}\n{"execute": "query-status", "id": 7}\n')
        await stream.send_eof()
        replies = [json.loads(line) for line in (await _read_all(stream)).splitlines()]
    assert any(reply.get("id") == 7 and reply["return"]["status"] == "running" for reply in replies)


@asynccontextmanager
async def bench() -> AsyncIterator[Path]:
    """A server, until the end of the block; its path."""
    with tempfile.TemporaryDirectory(prefix="vhs-control-") as folder:
        path = Path(folder) / "control"
        async with running(path, FakeBackend()):
            yield path


async def play(path: Path, seed: int) -> None:
    """One to three clients at once; then, sometimes, a good one."""
    with structlog.testing.capture_logs() as said, anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            for client in range(1 + seed % 3):
                tasks.start_soon(unruly, path, 3 * seed + client)
        if seed % 8 == 0:
            await good(path)
    unforeseen = [entry for entry in said if entry["log_level"] == "error"]
    assert unforeseen == []
