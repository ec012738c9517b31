# SPDX-License-Identifier: Apache-2.0
import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostsync import events
from vhostsync.events import MIRROR_PROGRESS, MIRROR_STATE_CHANGE, Event, EventHub, Subscription

pytestmark = pytest.mark.anyio


async def received(subscription: Subscription) -> list[Event]:
    subscription.close()
    return [event async for event in subscription]


async def test_every_subscriber_gets_every_event_in_order() -> None:
    hub = EventHub()
    async with hub.subscribe() as one, hub.subscribe() as two:
        for number in range(3):
            hub.publish(MIRROR_PROGRESS, {"number": number})
        for subscription in (one, two):
            assert [event.data["number"] for event in await received(subscription)] == [0, 1, 2]


async def test_what_was_published_before_is_not_seen() -> None:
    hub = EventHub()
    hub.publish(MIRROR_PROGRESS)
    async with hub.subscribe() as subscription:
        hub.publish(events.SHUTDOWN)
        assert [event.name for event in await received(subscription)] == ["SHUTDOWN"]


async def test_a_waiting_subscriber_is_woken() -> None:
    hub = EventHub()
    got: list[str] = []
    async with anyio.create_task_group() as tasks, hub.subscribe() as subscription:

        async def read() -> None:
            async for event in subscription:
                got.append(event.name)
                hub.close()

        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        hub.publish(MIRROR_PROGRESS)
    assert got == [MIRROR_PROGRESS]


async def test_a_cancelled_wait_loses_nothing() -> None:
    hub = EventHub()
    async with hub.subscribe() as subscription:
        with anyio.move_on_after(0):
            await anext(subscription)
        hub.publish(MIRROR_PROGRESS)
        assert (await anext(subscription)).name == MIRROR_PROGRESS


async def test_a_slow_subscriber_loses_the_oldest_progress_and_is_told() -> None:
    hub = EventHub()
    async with hub.subscribe(buffer_events=3) as slow, hub.subscribe() as quick:
        hub.publish(MIRROR_STATE_CHANGE, {"number": 0})
        for number in range(1, 6):
            hub.publish(MIRROR_PROGRESS, {"number": number})
        kept = await received(slow)
        assert [(event.data["number"], event.lost) for event in kept] == [(0, 3), (4, 0), (5, 0)]
        assert len(await received(quick)) == 6


async def test_changes_of_state_are_lost_only_among_themselves() -> None:
    hub = EventHub()
    async with hub.subscribe(buffer_events=2) as slow:
        for number in range(4):
            hub.publish(MIRROR_STATE_CHANGE, {"number": number})
        assert [(event.data["number"], event.lost) for event in await received(slow)] == [(2, 2), (3, 0)]


@given(st.lists(st.sampled_from([MIRROR_PROGRESS, MIRROR_STATE_CHANGE]), max_size=40), st.integers(1, 8))
def test_what_arrives_and_what_is_lost_add_up(names: list[str], room: int) -> None:
    async def check() -> None:
        hub = EventHub()
        async with hub.subscribe(buffer_events=room) as slow:
            for number, name in enumerate(names):
                hub.publish(name, {"number": number})
            assert len(slow._events) <= room
            kept = await received(slow)
        assert len(kept) + sum(event.lost for event in kept) == len(names)
        numbers = [event.data["number"] for event in kept]
        assert numbers == sorted(numbers)
        states = [number for number, name in enumerate(names) if name == MIRROR_STATE_CHANGE]
        if len(states) < room:
            assert set(states) <= set(numbers)

    anyio.run(check)


async def test_a_closed_hub_ends_its_subscribers_after_their_last_event() -> None:
    hub = EventHub()
    async with hub.subscribe() as subscription:
        hub.publish(events.SHUTDOWN)
        hub.close()
        assert [event.name async for event in subscription] == ["SHUTDOWN"]
    async with hub.subscribe() as late:
        assert [event async for event in late] == []


async def test_a_subscriber_that_left_is_forgotten() -> None:
    hub = EventHub()
    async with hub.subscribe():
        pass
    assert not hub._subscribers


def test_a_buffer_without_room_is_a_programmers_error() -> None:
    with pytest.raises(ValueError, match="room"):
        EventHub().subscribe(buffer_events=0)
