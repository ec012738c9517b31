# SPDX-License-Identifier: Apache-2.0
"""What a frontend sends for a live migration, and what it leads to."""

import errno
from dataclasses import replace

import pytest

from tests.protocol.desk import Desk
from tests.protocol.fakes import FD, WANTED
from vhostsync.errors import FrontendError
from vhostsync.vhost_user.messages import ProtocolFeature, Request
from vhostsync.vhost_user.payloads import U64, LogArea, VringAddress, encode_u64
from vhostsync.vhost_user.rules import OFFERED
from vhostsync.vhost_user.virtio_blk import Feature

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leak")]

R = Request


async def test_the_dirty_log_always_has_a_reply_and_only_one(desk: Desk) -> None:
    await desk.negotiate()
    for need_reply in (False, True):
        reply = await desk.say(R.SET_LOG_BASE, LogArea(4096, 64), 1, need_reply=need_reply)
        assert reply == encode_u64(0)
    assert desk.calls == [("set_log_base", FD, 4096, 64)] * 2


async def test_the_dirty_log_needs_its_feature(desk: Desk) -> None:
    await desk.negotiate(OFFERED & ~ProtocolFeature.LOG_SHMFD)
    with pytest.raises(FrontendError, match="LOG_SHMFD"):
        await desk.say(R.SET_LOG_BASE, LogArea(4096, 0), 1)


@pytest.mark.parametrize("need_reply", [False, True])
async def test_a_dirty_log_that_cannot_be_used_ends_the_connection(desk: Desk, need_reply: bool) -> None:
    """Its reply cannot say so (QEMU does not look at it), and the machine would arrive with stale pages."""
    await desk.negotiate()
    desk.attachment.refuse["set_log_base"] = errno.EINVAL
    with pytest.raises(FrontendError, match="SET_LOG_BASE failed"):
        await desk.say(R.SET_LOG_BASE, LogArea(4096, 0), 1, need_reply=need_reply)


async def test_logging_is_switched_while_the_ring_runs(desk: Desk) -> None:
    await desk.negotiate()
    await desk.start()
    await desk.say(R.SET_LOG_BASE, LogArea(4096, 0), 1)
    ack = await desk.say(R.SET_FEATURES, U64(WANTED | Feature.LOG_ALL), need_reply=True)
    assert ack == encode_u64(0)
    logged = VringAddress(0, 0x1000, 0x3000, 0x2000, 0x3000)
    assert await desk.say(R.SET_VRING_ADDR, logged, need_reply=True) == encode_u64(0)
    await desk.say(R.SET_FEATURES, U64(WANTED))
    await desk.say(R.SET_VRING_ADDR, replace(logged, log=None))
    plain = WANTED & ~Feature.PROTOCOL_FEATURES
    assert desk.calls == [
        ("set_log_base", FD, 4096, 0),
        ("set_features", plain | Feature.LOG_ALL),
        ("set_vring_addr", 0, 0x1000, 0x3000, 0x2000, 0x3000),
        ("set_features", plain),
        ("set_vring_addr", 0, 0x1000, 0x3000, 0x2000, None),
    ]
    assert desk.session.state.rings[0].running


async def test_who_wants_to_know_that_the_dirty_log_has_changed(desk: Desk) -> None:
    await desk.negotiate()
    assert await desk.say(R.SET_LOG_FD, None, 1, need_reply=True) == encode_u64(0)
    assert desk.calls == [("set_log_fd", FD)]
