# SPDX-License-Identifier: Apache-2.0
"""What `receive` is told, and the name of its disk on the other side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vhostsync.errors import ConfigError, DiskError, EngineError
from vhostsync.receive.receive_config import Address, ReceiveConfig, parse_address
from vhostsync.storage import receive
from vhostsync.storage.identity import DiskIdentity
from vhostsync.storage.kinds import absolute_name
from vhostsync.storage.receive import CERTIFICATES, KIND, ReceiveDisk, ReceiveUri


def make(**given: Any) -> ReceiveConfig:
    usual = {"listen": Address("::", 7070), "tls_certificates": Path("/pki"), "blk_file": Path("/d.img")}
    return ReceiveConfig(**{**usual, **given})


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("0.0.0.0:7070", "0.0.0.0", 7070), ("[::]:1", "::", 1), ("b.example:65535", "b.example", 65535)],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert parse_address(text) == Address(host, port) and str(Address(host, port)) == text


@pytest.mark.parametrize("text", ["", "7070", ":7070", "b:", "b:65536", "::1:7070", "b:70 70", "/run/x:1"])
def test_what_is_no_address_is_a_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no HOST:PORT; write"):
        parse_address(text)


def test_the_data_has_the_port_after_it_unless_told() -> None:
    assert make().wanted_data_port == 7071
    assert make(listen=Address("::", 0)).wanted_data_port == 0
    assert make(data_port=9).wanted_data_port == 9
    for wrong, why in (
        ({"data_port": 7070}, "is the port of --listen"),
        ({"listen": Address("::", 65535)}, "no port is left"),
        ({"data_port": 65536}, "--data-port 65,536 is out of range"),
        ({"user": ":g"}, "is not NAME or NAME:GROUP"),
        ({"control_path": Path("/" + "x" * 200)}, "--control: .* is longer than"),
    ):
        with pytest.raises(ConfigError, match=why):
            make(**wrong)


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make(blk_file=Path("d.img"), tls_certificates=Path("pki"), control_path=Path("c"))
    assert (config.blk_file, config.tls_certificates) == (tmp_path / "d.img", tmp_path / "pki")
    assert config.control_path == tmp_path / "c"


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("receive://b:7070", "receive://b:7070"),
        ("receive://b:7070/", "receive://b:7070"),
        ("receive://[fe80::1]:7070?tls-certificates=/a b", "receive://[fe80::1]:7070?tls-certificates=/a%20b"),
        (f"receive://b:7070?tls-certificates={CERTIFICATES}&data-port=7071", "receive://b:7070"),
        ("receive://b:7070?data-port=9", "receive://b:7070?data-port=9"),
    ],
)
def test_names(name: str, whole: str) -> None:
    assert absolute_name(name, "The disk") == whole
    assert ReceiveUri.parse(whole).text == whole


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("receive://", "names no receiver"),
        ("receive://b", "names no receiver"),
        ("receive://:7070", "names no receiver"),
        ("receive://b:x", "names no receiver"),
        ("receive://b:7070/disk", "names no receiver"),
        ("receive://me@b:7070", "names no receiver"),
        ("receive://b:7070#x", "names no receiver"),
        ("receive://b:7070?token=x", "token=x is not known here"),
        ("receive://b:7070?data-port=0", "data-port=0 is not known here"),
    ],
)
def test_what_names_no_receiver_is_a_sentence(name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        absolute_name(name, "The disk")


class Data:
    read_only = False

    def to_engine(self) -> str:
        return "a disk"


def test_nothing_is_written_where_the_token_is_not_known() -> None:
    identity = DiskIdentity("receive://b:7070", KIND, 0, 0, 4096, serial="d", mark="token")
    uri, data = ReceiveUri.parse(identity.path), Data()
    assert ReceiveDisk(uri, data, identity, 1, "token").to_engine() == "a disk"  # type: ignore[arg-type]
    for borne in (None, "another"):
        with pytest.raises(EngineError, match="does not know whose it is: nobody has told it"):
            ReceiveDisk(uri, data, identity, 1, borne).to_engine()  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [-1, 1 << 63, 4096.5, float("inf"), True, "4096", []])
def test_a_size_that_no_disk_has_reaches_no_record(monkeypatch: pytest.MonkeyPatch, size: Any) -> None:
    """A start would refuse that record, and with it a guest whose own disk is whole."""

    class Lying:
        def __init__(self, uri: ReceiveUri) -> None:
            self.uri = uri

        def __enter__(self) -> Lying:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def ask(self, command: str, **_: Any) -> dict[str, Any]:
            known = {"disk": "d", "bytes": size}
            begun = {"generation": 1, "user": "u", "key": "k", "port": 7071, "export": "e"}
            return known if command == "query" else {**known, **begun}

    monkeypatch.setattr(receive, "Receiver", Lying)
    with pytest.raises(DiskError, match="is no receiver: it begins a generation with what is none"):
        receive.RECEIVE.open("receive://b:7070", read_only=False, cache="none", lock_timeout_s=1)
    if size:  # else it is not known
        with pytest.raises(OSError, match="no disk has such a size"):
            receive.RECEIVE.identify("receive://b:7070")
