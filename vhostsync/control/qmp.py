# SPDX-License-Identifier: Apache-2.0
"""The QMP wire protocol, server side, without sockets (QEMU docs/interop/qmp-spec.rst).

`Parser` cuts a byte stream into JSON values; `Session` is one client's conversation: greeting, capability
negotiation, then requests. Bytes that are no request are answered here, with the errors that QEMU gives,
and are never a reason to end the connection: the client may go on.

What is left out: `oob` (not offered in the greeting, so no client may ask for it), and the single-quoted
strings that QEMU's own parser takes beyond JSON."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from .. import __version__

MESSAGE_BYTES_MAX: Final = 64 * 1024
"""One request at most; what is longer is answered with an error and skipped to the end of its line."""

DEPTH_MAX: Final = 32
"""Objects and arrays nested in one request."""

GENERIC_ERROR: Final = "GenericError"
COMMAND_NOT_FOUND: Final = "CommandNotFound"
CAPABILITIES: Final = "qmp_capabilities"
GOING_DOWN: Final = "The backend is going down."

# What moves the scanner: outside strings brackets and quotes, inside them quote and backslash; and in both
# the bytes that no JSON may hold there. 0xFF is the byte that the specification gives clients to get a
# parser back to its start.
_OUTSIDE = re.compile(rb'[{}\[\]"\x00-\x08\x0b\x0c\x0e-\x1f\xff]')
_INSIDE = re.compile(rb'["\\\x00-\x1f\xff]')
_BETWEEN = re.compile(rb"[ \t\r\n]*")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _Absent:
    """Tells a request without an id from one whose id is null."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = _Absent()


@dataclass(frozen=True)
class Bad:
    """Bytes that are no JSON value; `reason` is the error's text."""

    reason: str


@dataclass(frozen=True)
class Value:
    """One JSON value that a client sent."""

    value: Any


@dataclass(frozen=True)
class Request:
    """A well-formed request whose command is still to be looked up. `id` is whatever the client gave, or
    ABSENT."""

    command: str
    arguments: Mapping[str, Any]
    id: Any = ABSENT


@dataclass(frozen=True)
class Reply:
    """An answer that needs no command: an error, or (`negotiated`) the end of the negotiation."""

    line: bytes
    negotiated: bool = False


class Parser:
    """Cuts a stream into JSON values, however it is cut into packets. Holds MESSAGE_BYTES_MAX at most."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._restart()
        self._skipping = False  # up to the end of the line, after something hopeless

    def _restart(self) -> None:
        self._scanned = 0  # bytes of the buffer that were looked at
        self._depth = 0
        self._in_string = False

    def feed(self, data: bytes) -> Iterator[Value | Bad]:
        """What `data` completes. The iterator must be used up before the next call."""
        self._buffer += data
        while True:
            if self._skipping and not self._skip_line():
                return
            if self._depth == 0 and not self._in_string:
                del self._buffer[: _BETWEEN.match(self._buffer).end()]  # type: ignore[union-attr]
                if not self._buffer:
                    return
                if self._buffer[0] not in b"{[":
                    yield self._no_container()
                    continue
            end = self._scan()
            if isinstance(end, Bad):
                yield end
            elif end is None:
                return
            else:
                raw = bytes(self._buffer[:end])
                self._drop(end)
                yield _decode(raw)

    def _scan(self) -> int | Bad | None:
        """The length of the value at the start of the buffer, None when more bytes are needed."""
        buffer = self._buffer
        while match := (_INSIDE if self._in_string else _OUTSIDE).search(buffer, self._scanned):
            at, byte = match.start(), match[0]
            self._scanned = at + 1
            if at >= MESSAGE_BYTES_MAX:
                break
            if byte == b"\\":
                if at + 1 == len(buffer):
                    self._scanned = at  # the escaped byte is not here yet
                    return None
                if buffer[at + 1] >= 0x20 and buffer[at + 1] != 0xFF:
                    self._scanned = at + 2
            elif byte == b'"':
                self._in_string = not self._in_string
            elif byte in b"{[":
                self._depth += 1
                if self._depth > DEPTH_MAX:
                    return self._skip("JSON nesting depth limit exceeded")
            elif byte in b"}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
            else:
                self._drop(at + 1)
                return Bad(f"JSON parse error, stray byte 0x{byte[0]:02x}")
        self._scanned = max(self._scanned, len(buffer))
        if len(buffer) > MESSAGE_BYTES_MAX:
            return self._skip(f"JSON value is longer than {MESSAGE_BYTES_MAX} bytes")
        return None

    def _no_container(self) -> Bad:
        """Something that starts no object or array: a number, a word, rubbish. The rest of its line goes
        with it."""
        if self._buffer[0] == 0xFF:
            self._drop(1)
            return Bad("JSON parse error, stray byte 0xff")
        return self._skip("JSON parse error, expecting an object")

    def _skip(self, reason: str) -> Bad:
        self._skipping = True
        self._restart()
        return Bad(reason)

    def _skip_line(self) -> bool:
        """Whether the end of the line was found."""
        ends = [at for at in (self._buffer.find(b"\n"), self._buffer.find(b"\xff")) if at >= 0]
        self._skipping = not ends
        self._drop(min(ends) + 1 if ends else len(self._buffer))
        return bool(ends)

    def _drop(self, count: int) -> None:
        del self._buffer[:count]
        self._restart()


def _decode(raw: bytes) -> Value | Bad:
    try:
        value = json.loads(
            raw.decode(),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
        )
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no character
    except ValueError as error:  # also UnicodeError, and integers of thousands of digits
        return Bad(f"JSON parse error, {error}")
    return Value(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("number is out of range")
    return number


class Session:
    """One client's conversation. In negotiation mode only `qmp_capabilities` is understood."""

    def __init__(self) -> None:
        self._parser = Parser()
        self.negotiated = False

    def receive(self, data: bytes) -> Iterator[Request | Reply]:
        """Requests to carry out and replies to send, in the order in which the client must see their
        answers."""
        for item in self._parser.feed(data):
            yield Reply(error_line(item.reason)) if isinstance(item, Bad) else self._request(item.value)

    def _request(self, value: Any) -> Request | Reply:
        request = request_of(value)
        if isinstance(request, str):
            return Reply(error_line(request, value.get("id", ABSENT) if isinstance(value, dict) else ABSENT))
        identity = request.id
        if request.command == CAPABILITIES:
            return self._negotiate(request)
        if not self.negotiated:
            return Reply(
                error_line(
                    f"Expecting capabilities negotiation with '{CAPABILITIES}'", identity, COMMAND_NOT_FOUND
                )
            )
        return request

    def _negotiate(self, request: Request) -> Reply:
        def refuse(reason: str, kind: str = GENERIC_ERROR) -> Reply:
            return Reply(error_line(reason, request.id, kind))

        if self.negotiated:
            return refuse("Capabilities negotiation is already complete, command ignored", COMMAND_NOT_FOUND)
        for name in request.arguments:
            if name != "enable":
                return refuse(f"Parameter '{name}' is unexpected")
        enable = request.arguments.get("enable", [])
        if not isinstance(enable, list):
            return refuse("Invalid parameter type for 'enable', expected: array")
        if enable:
            return refuse(f"Capability {json.dumps(enable[0])} is not available")
        self.negotiated = True
        return Reply(return_line({}, request.id), negotiated=True)


def request_of(value: Any) -> Request | str:
    """The request that a JSON value is, or what is wrong with it."""
    if not isinstance(value, dict):
        return "QMP input must be a JSON object"
    reason = _fault(value)
    return reason or Request(value["execute"], value.get("arguments", {}), value.get("id", ABSENT))


def _fault(value: Mapping[str, Any]) -> str | None:
    """What is wrong with a request's members, in QEMU's words."""
    for name in value:
        if name not in ("execute", "arguments", "id"):
            return f"QMP input member '{name}' is unexpected"
    if "execute" not in value:
        return "QMP input lacks member 'execute'"
    if not isinstance(value["execute"], str):
        return "QMP input member 'execute' must be a string"
    if not isinstance(value.get("arguments", {}), dict):
        return "QMP input member 'arguments' must be an object"
    return None


def version() -> dict[str, Any]:
    """This program's version in the shape of QEMU's query-version, so that QMP clients can read it."""
    major, minor, micro = (int(part) for part in __version__.split(".")[:3])
    return {"qemu": {"micro": micro, "minor": minor, "major": major}, "package": f"vhostsync-{__version__}"}


def greeting_line() -> bytes:
    """What the server sends first."""
    return _line({"QMP": {"version": version(), "capabilities": []}})


def return_line(value: Any, identity: Any = ABSENT) -> bytes:
    """A successful reply."""
    return _line(_with_id({"return": value}, identity))


def error_line(reason: str, identity: Any = ABSENT, kind: str = GENERIC_ERROR) -> bytes:
    """A reply that tells of an error; `reason` is for people."""
    return _line(_with_id({"error": {"class": kind, "desc": reason}}, identity))


def event_line(name: str, data: Mapping[str, Any], wall_ns: int) -> bytes:
    """An event; `wall_ns` is nanoseconds since the epoch."""
    seconds, rest_ns = divmod(wall_ns, 1_000_000_000)
    timestamp = {"seconds": seconds, "microseconds": rest_ns // 1000}
    event: dict[str, Any] = {"timestamp": timestamp, "event": name}
    if data:
        event["data"] = dict(data)
    return _line(event)


def _with_id(message: dict[str, Any], identity: Any) -> dict[str, Any]:
    if identity is not ABSENT:
        message["id"] = identity
    return message


def _line(message: Mapping[str, Any]) -> bytes:
    # Plain ASCII, so that no reader can trip over a character; CRLF as QEMU ends its lines.
    return json.dumps(message, allow_nan=False).encode("ascii") + b"\r\n"
