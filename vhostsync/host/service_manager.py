# SPDX-License-Identifier: Apache-2.0
"""What `serve` tells the service manager that started it (sd_notify(3)): ready, stopping, and a line of
status. Without one ($NOTIFY_SOCKET is not set) nothing happens.

The protocol is a datagram; a library for it would be longer than this.
"""

import os
import select
import socket
from collections.abc import Callable
from typing import Final

import anyio
import anyio.abc
import structlog

from vhostsync import events
from vhostsync.events import EventHub
from vhostsync.printable import printable

log = structlog.get_logger(__name__)

HEARD_S: Final = 5
TELLING: Final = (events.MIRROR_STATE_CHANGE, events.SWITCH_COMPLETED, events.SOURCE_FAILOVER)


class ServiceManager:
    """Connected as long as this process may do anything: later Landlock lets it send to no abstract socket
    but one that it is connected to, and another user may not be let through to a path."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        place = os.environ.get("NOTIFY_SOCKET", "")
        if not place:
            return
        self._address = "\0" + place[1:] if place.startswith("@") else place
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            self._socket.connect(self._address)
        except OSError as error:
            log.warning("the service manager cannot be reached", error=error.strerror)

    def tell(self, **fields: str | int) -> None:
        """`tell(READY=1, STATUS="serving")`, each in one line, whatever a path has in it. Never waits; what
        cannot be sent is logged and lost."""
        if self._socket is None:
            return
        message = "\n".join(f"{name}={printable(str(value))}" for name, value in fields.items())
        try:
            try:
                self._socket.send(message.encode())
            except OSError:  # it was restarted: its socket is another one
                self._socket.connect(self._address)
                self._socket.send(message.encode())
        except OSError as error:
            log.warning("the service manager was not told", what=message, error=error.strerror)

    def await_heard(self) -> None:
        """Until it has dealt with all that it was told (sd_notify(3), BARRIER=1), but no longer than HEARD_S.
        Blocks."""
        if self._socket is None:
            return
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                socket.send_fds(self._socket, [b"BARRIER=1"], [theirs])
            finally:
                os.close(theirs)
            heard = select.poll()
            heard.register(ours, 0)  # its end is told all the same, once the manager has closed the other one
            if not heard.poll(HEARD_S * 1000):
                log.warning("the service manager does not say that it has heard", seconds=HEARD_S)
        except OSError as error:
            log.warning("the service manager cannot be asked whether it has heard", error=error.strerror)
        finally:
            os.close(ours)

    async def follow(
        self,
        status: Callable[[], str],
        hub: EventHub,
        *,
        task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Tell that it serves, then how things stand (`status`) whenever that changes, until cancelled."""
        async with hub.subscribe() as changes:
            told = status()
            self.tell(READY=1, STATUS=told)
            task_status.started()
            async for event in changes:
                if event.name in TELLING and (now := status()) != told:
                    told = now
                    self.tell(STATUS=told)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
