# SPDX-License-Identifier: Apache-2.0
"""`--destination-retry`: a destination that was away is attached again by itself, and gets what differs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from tests.daemon.rig import Served, await_true, ext4, flush, image, lacking, same_content, write_block
from tests.guest.images import new_image
from tests.guest.qmp_client import QmpError

OPTIONS = ("--destination-timeout", "500ms", "--destination-retry", "200ms")


def test_it_comes_back_by_itself(work: Path) -> None:
    source = image(work / "a.img")
    with ext4(work) as away:
        other = new_image(away.folder / "b.img", 16)
        with Served(work, source, *OPTIONS) as served, served.guest() as guest:
            served.start_mirror(other)
            await_true(lambda: served.mirror()["differing-bytes"] == 0, "all is settled")
            away.freeze()
            write_block(guest, 1, 1)
            served.await_state("degraded")
            flush(guest)
            # It cannot come back while it hangs: that is told, and tried again.
            assert served.qmp.wait_event("DESTINATION_RETRY", 30, what="failed")["error"]
            write_block(guest, 2000, 2)
            away.thaw()
            assert served.qmp.wait_event("DESTINATION_RETRY", 30, what="attached")["attempt"] > 1
            served.await_resumed()  # at the second go if the disk was slow to wake
            assert served.mirror()["full-copy-reason"] is None
            guest.close()
            served.stop()
        assert same_content(source, other)
        assert lacking(other, {1: 1, 2000: 2}) == []


@pytest.mark.parametrize("answers", [False, True], ids=["while it hangs", "when it answers again"])
def test_a_cancel_ends_it(work: Path, answers: bool) -> None:
    source = image(work / "a.img")
    with ext4(work) as away:
        other = new_image(away.folder / "b.img", 16)
        with Served(work, source, *OPTIONS) as served, served.guest() as guest:
            served.start_mirror(other)
            away.freeze()
            write_block(guest, 1, 1)
            served.await_state("degraded")
            served.qmp.wait_event("DESTINATION_RETRY", 30, what="failed")
            if answers:
                away.thaw()
            await_true(lambda: cancelled(served), "it is cancelled, once it is not being attached")
            assert served.state == "passthrough"
            served.qmp.events.clear()
            away.thaw()
            # What was given up is over then, which is when it would be tried again.
            await_true(lambda: not holds(served, other), "it is closed")
            served.qmp.execute("query-status")
            assert not any(event["event"] == "DESTINATION_RETRY" for event in served.qmp.events)
            assert served.state == "passthrough"
            guest.close()
            served.stop()


def cancelled(served: Served) -> bool:
    try:
        served.qmp.execute("mirror-cancel", force=True)
    except QmpError as refused:
        assert "resuming the mirror is under way; try again when it is over" in str(refused)
        return False
    return True


def holds(served: Served, disk: Path) -> bool:
    """Has it open."""
    for fd in Path(f"/proc/{served.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed by now
            if fd.readlink() == disk:
                return True
    return False
