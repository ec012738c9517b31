# SPDX-License-Identifier: Apache-2.0
"""What the mirror knows of the disk that it has let go of."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.daemon.rig import image
from vhostsync.mirror import peer as peer_module
from vhostsync.mirror.destination import Place, look_again
from vhostsync.mirror.peer import Peer
from vhostsync.storage.disk import Disk
from vhostsync.storage.identity import DiskIdentity
from vhostsync.storage.kinds import identify


def test_a_change_shows_where_a_look_that_began_before_it_ends_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that ends a mirror has looked, and returned; another thread still looks."""
    path = image(tmp_path / "b.img", 1)
    began, may_look = threading.Event(), threading.Event()
    late = threading.Thread(target=lambda: peer.look())

    def look_late(place: Place) -> DiskIdentity | None:
        if threading.current_thread() is late:
            began.set()
            assert may_look.wait(30)
        return look_again(place)

    monkeypatch.setattr(peer_module, "look_again", look_late)
    peer = Peer()
    peer.attached(Place.of_identity(identify(str(path))))
    peer.detached()
    late.start()
    assert began.wait(30)
    peer.look()
    with path.open("r+b") as file:
        file.write(b"somebody else")
    may_look.set()
    late.join()
    now = identify(str(path))
    disk = cast(Disk, SimpleNamespace(identity=now, as_it_is=lambda: now))
    assert peer.why_full(disk) == "it was changed since (ctime) since the mirror let go of it"


def test_what_was_not_seen_in_time_does_not_count(tmp_path: Path) -> None:
    """Nor is anything believed that the disk could hold: somebody may have changed it unseen."""
    place = Place.of_identity(identify(str(image(tmp_path / "b.img", 1))))
    peer = Peer()

    def known() -> tuple[bool, bool, bool]:
        return peer.place is place, peer.left is not None, peer.may_be_changed

    peer.attached(place)
    peer.give_up(place)
    assert known() == (True, False, False)
    peer.detached()
    assert known() == (True, False, True)
    peer.give_up(place)
    peer.look()
    assert known() == (False, False, True) and peer.forgotten
    peer.attached(place)
    assert known() == (True, False, False)
    peer.detached()
    peer.look()
    peer.give_up(place)
    assert known() == (True, True, False)


def test_a_change_after_a_crash_is_no_state_that_the_mirror_has_left(tmp_path: Path) -> None:
    """The next clean end is not to record it as one."""
    path = image(tmp_path / "b.img", 1)
    peer = Peer()
    peer.known(identify(str(path)), None, until_ns=1)
    peer.look()
    assert peer.left is None and peer.may_be_changed


def test_of_a_disk_whose_changes_do_not_show_nothing_is_given_up(tmp_path: Path) -> None:
    place = Place.of_identity(replace(identify(str(image(tmp_path / "b.img", 1))), kind="block"))
    peer = Peer()
    peer.attached(place)
    peer.detached()
    assert not peer.may_be_changed and not peer.give_up(place) and peer.place is place
