# SPDX-License-Identifier: Apache-2.0
"""When it is said that a frontend gets nothing, and when it is not."""

from collections.abc import Sequence
from dataclasses import replace

import anyio
import pytest
from structlog.testing import capture_logs

from tests.protocol.fakes import RecordingAttachment
from vhostsync.vhost_user import ring_watch
from vhostsync.vhost_user.attachment import Attachment
from vhostsync.vhost_user.ring_watch import EMPTY_RINGS, NO_MEMORY, RingsSeen, trouble, watch_rings

MINE, OTHER = RecordingAttachment(), RecordingAttachment(base=8)
BEFORE = RingsSeen(None, False, kicks=(5, 0), requests=(3, 0))
RUNNING = replace(BEFORE, active=MINE, running=True)


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (BEFORE, None),  # rings were just stopped
        (RUNNING, None),
        (replace(RUNNING, kicks=(6, 1)), None),  # QEMU rings at each start
        (replace(RUNNING, kicks=(7, 1)), EMPTY_RINGS),
        (replace(RUNNING, kicks=(6, 2)), EMPTY_RINGS),
        (replace(RUNNING, kicks=(9, 2), requests=(3, 1)), None),
        (replace(RUNNING, running=False), NO_MEMORY),
        (replace(RUNNING, active=OTHER, kicks=(99, 9), requests=(99, 9)), "frontend 4 has stopped its rings"),
    ],
)
def test_what_is_said(seen: RingsSeen, said: str | None) -> None:
    reason = trouble(BEFORE, seen, MINE, 4)
    assert (reason is None) == (said is None)
    assert said is None or said in (reason or "")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("looks", "said"),
    [
        ([RUNNING, replace(RUNNING, requests=(4, 0))], []),
        (
            [
                replace(RUNNING, active=OTHER),
                replace(RUNNING, active=OTHER, kicks=(9, 9), requests=(9, 9)),
                replace(RUNNING, kicks=(9, 9), requests=(9, 9)),
                replace(RUNNING, kicks=(10, 9), requests=(10, 9)),
            ],
            ["frontend does not get on", "frontend gets on"],
        ),
        (
            [replace(RUNNING, running=False)] * 3 + [replace(RUNNING, kicks=(7, 0), requests=(4, 0))],
            ["frontend does not get on", "frontend gets on"],
        ),
    ],
)
async def test_each_thing_is_said_once_and_the_watch_ends_with_a_request(
    looks: Sequence[RingsSeen], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_watch, "FIRST_LOOK_S", 0.0)
    coming = iter(looks)

    async def look() -> RingsSeen:
        return next(coming)

    def number_of(attachment: Attachment | None) -> int | None:
        return 1 if attachment is OTHER else None

    with capture_logs() as logs, anyio.fail_after(20):
        await watch_rings(2, MINE, BEFORE, look, number_of)
    assert [line["event"] for line in logs] == said
    assert next(coming, None) is None
