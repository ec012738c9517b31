# SPDX-License-Identifier: Apache-2.0
"""When the lock of an RBD image may be broken unasked: only where its owner is certainly gone."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vhostsync.errors import ConfigError
from vhostsync.storage import rbd_owner
from vhostsync.storage.ceph_client import Access
from vhostsync.storage.rbd import parsed
from vhostsync.storage.rbd_owner import Note

ADDRESS = "127.0.0.1:0/77"


@pytest.fixture
def note(monkeypatch: pytest.MonkeyPatch) -> Note:
    """Of this process."""
    monkeypatch.setattr(rbd_owner, "_this_machine", lambda: "here")
    return Note.of_this_process(ADDRESS, 4711, ("127.0.0.1:0/3",))


def is_gone(note: Note, owner: str = ADDRESS, open_here: tuple[int, ...] = ()) -> bool:
    return note.owner_is_gone(owner, lambda client: client in open_here)


def test_a_note_is_read_as_it_was_written(note: Note) -> None:
    assert Note.read(note.text()) == note
    for text in (None, "", "{}", "[]", '{"client": 3}', note.text()[:-1]):
        assert Note.read(text) is None


def test_a_process_that_is_there_is_not_gone(note: Note) -> None:
    assert not is_gone(note, open_here=(4711,))
    with subprocess.Popen(["sleep", "60"]) as other:
        began = rbd_owner._began(other.pid)
        assert began is not None
        there = replace(note, pid=other.pid, began=began)
        assert not is_gone(there)
        other.kill()
    assert is_gone(there)


def test_a_number_that_another_process_has_by_now_is_no_owner(note: Note) -> None:
    assert is_gone(replace(note, pid=os.getppid(), began=1))


def test_a_client_of_this_process_that_was_closed_is_gone(note: Note) -> None:
    assert is_gone(note, open_here=(4712,))


def test_what_was_before_the_last_boot_of_this_host_is_gone(note: Note) -> None:
    assert is_gone(replace(note, boot="another"), open_here=(4711,))


@pytest.mark.parametrize(
    "change",
    [{"machine": "there"}, {"machine": ""}, {"machine": "there", "boot": "another"}, {"pids": "pid:[1]"}],
    ids=str,
)
def test_whom_nobody_here_can_look_for_may_be_there(note: Note, change: dict[str, Any]) -> None:
    assert not is_gone(replace(note, pid=1, began=1, **change))


def test_a_note_of_another_client_says_nothing_of_the_owner(note: Note) -> None:
    assert not is_gone(replace(note, boot="another"), owner="127.0.0.1:0/78")


def test_names() -> None:
    assert str(parsed("rbd:vms/web1")) == "vms/web1"
    assert parsed("rbd:vms/tenant/web1").namespace == "tenant"
    for wrong in ("rbd:", "rbd:vms", "rbd:vms/", "rbd:/web1", "rbd:a/b/c/d", "rbd:vms/a@b", "rbd:vms/a b"):
        with pytest.raises(ConfigError, match="names no image of a Ceph cluster"):
            parsed(wrong)


def test_how_a_cluster_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CEPH_CONF", raising=False)
    monkeypatch.setenv("CEPH_ARGS", "--id=web -c /args.conf")
    assert (Access().client, Access().conf_path()) == ("client.web", "/args.conf")
    assert Access(conf="/own.conf", user="vm").conf_path() == "/own.conf"
    assert Access(user="client.vm").client == "client.vm"
    monkeypatch.setenv("CEPH_ARGS", "-n client.db")
    (tmp_path / "c.conf").touch()
    monkeypatch.setenv("CEPH_CONF", f"/missing.conf {tmp_path}/c.conf")
    assert (Access().client, Access().conf_path()) == ("client.db", f"{tmp_path}/c.conf")
    monkeypatch.delenv("CEPH_ARGS")
    assert Access().client == "client.admin"
