# SPDX-License-Identifier: Apache-2.0
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostsync.control import qmp
from vhostsync.control.qmp import ABSENT, MESSAGE_BYTES_MAX, Bad, Parser, Reply, Request, Session, Value

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text('ab{["\\é', max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text('ab}]"\\é', max_size=4), JSON, max_size=4)


def parse(*packets: bytes) -> list[Value | Bad]:
    parser = Parser()
    return [item for packet in packets for item in parser.feed(packet)]


def negotiated() -> Session:
    session = Session()
    assert list(session.receive(b'{"execute": "qmp_capabilities"}'))
    return session


def reply(item: Request | Reply) -> dict[str, Any]:
    assert isinstance(item, Reply)
    assert item.line.endswith(b"\r\n")
    assert item.line.count(b"\n") == 1
    message = json.loads(item.line)
    assert isinstance(message, dict)
    return message


def error(item: Request | Reply) -> str:
    return str(reply(item)["error"]["desc"])


@given(
    st.lists(OBJECTS, max_size=5),
    st.sampled_from([b"", b"\n", b"\r\n", b"  \t"]),
    st.sampled_from([None, 1]),
    st.data(),
)
def test_values_survive_any_cut_into_packets(
    values: list[dict[str, Any]], between: bytes, indent: int | None, data: st.DataObject
) -> None:
    ascii_only = data.draw(st.booleans())
    stream = between.join(
        json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode() for value in values
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    packets = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert parse(*packets) == [Value(value) for value in values]


@given(
    st.lists(st.binary(max_size=40) | OBJECTS.map(lambda value: json.dumps(value).encode()[:-1]), max_size=8)
)
def test_rubbish_never_stops_the_parser(packets: list[bytes]) -> None:
    parser = Parser()
    for packet in packets:
        for item in parser.feed(packet):
            assert isinstance(item, Value | Bad)
    # 0xFF gets any parser back to its start, and a line's end ends what 0xFF may have left to be skipped.
    list(parser.feed(b"\xff\n"))
    assert list(parser.feed(b'{"a": 1}')) == [Value({"a": 1})]


@given(st.text('{}[]"\\:,1ue\n\x01\xff aé', max_size=60), st.integers(0, 60))
def test_a_cut_changes_nothing(text: str, cut: int) -> None:
    stream = text.encode("latin-1") + b"\xff\n"
    assert parse(stream) == parse(stream[:cut], stream[cut:])
    assert parse(stream) == parse(*(stream[i : i + 1] for i in range(len(stream))))


@pytest.mark.parametrize(
    "line",
    [
        b"hello\n",
        b"12 13\n",
        b'"execute"\n',
        b'{"execute": nope}\n',
        b'{"execute" "x"}\n',
        b'{"execute": "x\n',
        b'{"a": 1, "a": 2}\n',
        b'{"a": NaN}\n',
        b'{"a": -Infinity}\n',
        b'{"a": 1e999}\n',
        b'{"a": ' + b"1" * 5000 + b"}\n",
        b'{"a": "\xc3"}\n',
        b'{"a": "\\ud800"}\n',
        b'{"a": "\\x"}\n',
        b'{"a": ]\n',
        b"}\n",
        b"\xff",
        b"\x00\n",
        b"{\x01",
        b"[" * 33 + b"]" * 33 + b"\n",
    ],
)
def test_what_is_no_json_gets_one_error_and_the_next_request_works(line: bytes) -> None:
    items = parse(line, b'{"ok": true}')
    assert [type(item) for item in items] == [Bad, Value]
    assert items[1] == Value({"ok": True})


def test_pairs_of_surrogates_and_depth_up_to_the_bound_are_json() -> None:
    assert parse(b'{"a": "\\ud83d\\ude00"}') == [Value({"a": "\U0001f600"})]
    [item] = parse(b"[" * 32 + b"]" * 32)
    assert isinstance(item, Value)


@pytest.mark.parametrize("packet_bytes", [1 << 20, 1000])
def test_the_longest_value_is_taken_and_a_longer_one_is_skipped_to_the_end_of_its_line(
    packet_bytes: int,
) -> None:
    def of_length(size: int) -> bytes:
        return b'{"a": "' + b"x" * (size - 9) + b'"}'

    stream = b"\n".join([of_length(MESSAGE_BYTES_MAX), of_length(MESSAGE_BYTES_MAX + 1), b'{"ok": 1}'])
    packets = [stream[at : at + packet_bytes] for at in range(0, len(stream), packet_bytes)]
    first, second, third = parse(*packets)
    assert isinstance(first, Value)
    assert second == Bad(f"JSON value is longer than {MESSAGE_BYTES_MAX} bytes")
    assert third == Value({"ok": 1})


def test_a_value_without_end_is_not_kept() -> None:
    parser = Parser()
    bad = [item for _ in range(40) for item in parser.feed(b'{"a": "' + b"x" * 10_000)]
    assert bad
    assert all(isinstance(item, Bad) for item in bad)
    assert len(parser._buffer) <= MESSAGE_BYTES_MAX


def test_nothing_but_the_negotiation_is_understood_before_it() -> None:
    session = Session()
    [refused] = session.receive(b'{"execute": "query-status", "id": 4}')
    assert reply(refused) == {
        "error": {
            "class": "CommandNotFound",
            "desc": "Expecting capabilities negotiation with 'qmp_capabilities'",
        },
        "id": 4,
    }
    [done, request] = session.receive(
        b'{"execute": "qmp_capabilities", "id": "n"}{"execute": "query-status"}'
    )
    assert reply(done) == {"return": {}, "id": "n"}
    assert isinstance(done, Reply)
    assert done.negotiated
    assert request == Request("query-status", {}, ABSENT)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"enable": ["oob"]}, 'Capability "oob" is not available'),
        ({"enable": "oob"}, "Invalid parameter type for 'enable', expected: array"),
        ({"disable": []}, "Parameter 'disable' is unexpected"),
    ],
)
def test_there_is_nothing_to_negotiate(arguments: dict[str, Any], reason: str) -> None:
    session = Session()
    line = json.dumps({"execute": "qmp_capabilities", "arguments": arguments}).encode()
    [item] = session.receive(line)
    assert error(item) == reason
    assert not session.negotiated
    [item] = session.receive(b'{"execute": "qmp_capabilities", "arguments": {"enable": []}}')
    assert reply(item) == {"return": {}}


def test_a_second_negotiation_is_refused() -> None:
    [item] = negotiated().receive(b'{"execute": "qmp_capabilities"}')
    assert reply(item)["error"]["class"] == "CommandNotFound"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ([], "QMP input must be a JSON object"),
        ({}, "QMP input lacks member 'execute'"),
        ({"execute": 1}, "QMP input member 'execute' must be a string"),
        ({"execute": "x", "arguments": []}, "QMP input member 'arguments' must be an object"),
        ({"execute": "x", "extra": 1}, "QMP input member 'extra' is unexpected"),
        ({"exec-oob": "x"}, "QMP input member 'exec-oob' is unexpected"),
    ],
)
def test_requests_of_a_wrong_shape_get_qemus_errors(message: Any, reason: str) -> None:
    if isinstance(message, dict):
        message["id"] = {"any": ["thing", None]}
    [item] = negotiated().receive(json.dumps(message).encode())
    answer = reply(item)
    assert answer["error"] == {"class": "GenericError", "desc": reason}
    assert answer.get("id") == (message["id"] if isinstance(message, dict) else None)


def test_an_id_of_null_is_an_id() -> None:
    [item] = negotiated().receive(b'{"execute": "x", "id": null}')
    assert isinstance(item, Request)
    assert json.loads(qmp.return_line({}, item.id)) == {"return": {}, "id": None}
    assert json.loads(qmp.return_line({})) == {"return": {}}


def test_events_have_qemus_timestamps() -> None:
    line = qmp.event_line("IO_ERROR", {"disk": "é"}, 1_700_000_000_123_456_789)
    assert line.isascii()
    assert json.loads(line) == {
        "event": "IO_ERROR",
        "data": {"disk": "é"},
        "timestamp": {"seconds": 1_700_000_000, "microseconds": 123_456},
    }
    assert "data" not in json.loads(qmp.event_line("SHUTDOWN", {}, 0))


def test_the_greeting_has_the_shape_that_clients_parse() -> None:
    greeting = json.loads(qmp.greeting_line())
    assert set(greeting["QMP"]["version"]["qemu"]) == {"micro", "minor", "major"}
    assert greeting["QMP"]["capabilities"] == []


@given(OBJECTS | JSON, st.booleans())
def test_any_json_value_gets_exactly_one_answer(value: Any, ready: bool) -> None:
    session = negotiated() if ready else Session()
    if not isinstance(value, dict | list):
        value = [value]
    [item] = session.receive(json.dumps(value).encode())
    if isinstance(item, Reply):
        assert set(reply(item)) <= {"error", "id"}
