# SPDX-License-Identifier: Apache-2.0
"""The config space as frontends read and write it, and the backend's word that it has changed."""

import errno

import pytest

from tests.protocol.desk import Desk
from tests.protocol.fakes import WANTED
from vhostsync.vhost_user.messages import Request
from vhostsync.vhost_user.payloads import (
    CONFIG_OLD_START,
    ConfigAccess,
    VringFile,
    VringState,
    encode_config,
    encode_u64,
)
from vhostsync.vhost_user.virtio_blk import Feature

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leak")]

R = Request


@pytest.mark.parametrize("size", [1, 8, 16, 24, 33, 36, 57, 60, 256])
async def test_config_space_is_read(desk: Desk, size: int) -> None:
    await desk.negotiate()
    expected = desk.blk.read_config(0, size, writeback=True)
    assert await desk.say(R.GET_CONFIG, ConfigAccess(0, 0, bytes(size))) == encode_config(0, 0, expected)
    last = desk.blk.read_config(256 - size, size, writeback=True)
    reply = await desk.say(R.GET_CONFIG, ConfigAccess(256 - size, 1, bytes(size)))
    assert reply == encode_config(256 - size, 1, last)


@pytest.mark.parametrize(
    ("access", "start"),
    [
        (ConfigAccess(CONFIG_OLD_START, 1, bytes(60)), 0),
        (ConfigAccess(CONFIG_OLD_START + 20, 1, bytes(4)), 20),
        (ConfigAccess(0, 0, bytes(8), padding_bytes=248), 0),
        (ConfigAccess(CONFIG_OLD_START + 255, 3, b"\0"), 255),
    ],
)
async def test_config_space_from_an_old_start_or_with_room_to_spare(
    desk: Desk, access: ConfigAccess, start: int
) -> None:
    """What is answered has the question's own offset and length."""
    await desk.negotiate()
    content = desk.blk.read_config(start, len(access.data), writeback=True)
    expected = encode_config(access.offset, access.flags, content, access.padding_bytes)
    assert await desk.say(R.GET_CONFIG, access) == expected
    assert len(expected) == 12 + len(access.data) + access.padding_bytes


@pytest.mark.parametrize("offset", [32, CONFIG_OLD_START + 32])
async def test_the_write_cache_is_written_wherever_the_frontend_begins_to_count(
    desk: Desk, offset: int
) -> None:
    await desk.negotiate()
    for padding in (0, 255):
        for value in (0, 1):
            access = ConfigAccess(offset, 0, bytes([value]), padding)
            assert await desk.say(R.SET_CONFIG, access, need_reply=True) == encode_u64(0)
            assert desk.attachment.writeback == bool(value)
    assert desk.refusals == []


async def test_the_write_cache_is_written(desk: Desk) -> None:
    await desk.negotiate()
    for value in (0, 1, 0):
        access = ConfigAccess(32, 0, bytes([value]))
        assert await desk.say(R.SET_CONFIG, access, need_reply=True) == encode_u64(0)
        assert await desk.say(R.GET_CONFIG, ConfigAccess(32, 0, b"\0")) == encode_config(
            32, 0, bytes([value])
        )
    assert desk.calls == [("set_write_cache", value) for value in (False, True, False)]


async def test_each_frontend_is_shown_the_mode_of_its_own_attachment(desk: Desk) -> None:
    await desk.negotiate()
    await desk.say(R.SET_CONFIG, ConfigAccess(32, 0, b"\0"))
    other = Desk(desk.blk)
    await other.negotiate()
    assert await other.say(R.GET_CONFIG, ConfigAccess(32, 0, b"\0")) == encode_config(32, 0, b"\1")


@pytest.mark.parametrize(
    "access",
    [
        ConfigAccess(32, 0, b"\2"),
        ConfigAccess(32, 0, b"\0\0"),
        ConfigAccess(31, 0, b"\0"),
        ConfigAccess(0, 1, b"\0"),
        ConfigAccess(CONFIG_OLD_START, 1, b"\0"),
        ConfigAccess(32, 0, b"\2", padding_bytes=255),
    ],
)
async def test_nothing_else_is_written(desk: Desk, access: ConfigAccess) -> None:
    """A guest can cause this; it hurts neither the connection nor the device."""
    await desk.negotiate()
    assert await desk.say(R.SET_CONFIG, access, need_reply=True) == encode_u64(1)
    assert await desk.say(R.SET_CONFIG, access) is None
    assert len(desk.refusals) == 2
    assert desk.calls == []
    assert desk.attachment.writeback


async def test_the_write_cache_needs_its_feature(desk: Desk) -> None:
    await desk.negotiate(features=WANTED & ~Feature.CONFIG_WCE)
    assert await desk.say(R.SET_CONFIG, ConfigAccess(32, 0, b"\0"), need_reply=True) == encode_u64(1)


async def test_a_write_cache_that_the_engine_refuses(desk: Desk) -> None:
    await desk.negotiate()
    desk.attachment.refuse["set_write_cache"] = errno.EBUSY
    assert await desk.say(R.SET_CONFIG, ConfigAccess(32, 0, b"\0"), need_reply=True) == encode_u64(1)
    assert desk.attachment.writeback


# ---- the backend's own requests ----------------------------------------------------------------------------


async def test_a_config_change_waits_for_a_channel_and_a_started_ring(desk: Desk) -> None:
    desk.session.config_changed()
    desk.session.config_changed()
    await desk.negotiate()
    await desk.lay_out()
    await desk.say(R.SET_BACKEND_REQ_FD, fds=1)
    (channel,) = desk.channels
    assert channel.sent == 0
    await desk.say(R.SET_VRING_KICK, VringFile(0, True), 1)
    assert channel.sent == 1
    desk.session.config_changed()
    assert channel.sent == 2
    await desk.say(R.GET_VRING_BASE, VringState(0, 0))
    desk.session.config_changed()
    assert channel.sent == 2
    await desk.say(R.SET_VRING_KICK, VringFile(0, True), 1)
    assert channel.sent == 3


async def test_a_channel_that_comes_late_and_one_that_is_replaced(desk: Desk) -> None:
    await desk.negotiate()
    await desk.start()
    desk.session.config_changed()
    await desk.say(R.SET_BACKEND_REQ_FD, fds=1)
    await desk.say(R.SET_BACKEND_REQ_FD, fds=1, need_reply=True)
    first, second = desk.channels
    assert (first.sent, first.closed, second.sent, second.closed) == (1, True, 0, False)
    desk.session.config_changed()
    assert second.sent == 1
    desk.session.close()
    assert second.closed
