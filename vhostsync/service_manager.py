# SPDX-License-Identifier: Apache-2.0
"""What `serve` tells the service manager that started it (sd_notify(3)): ready, stopping, and a line of
status. Without one ($NOTIFY_SOCKET is not set) nothing happens.

The protocol is a datagram; a library for it would be longer than this.
"""

import os
import socket

import structlog

log = structlog.get_logger(__name__)


def tell(**fields: str | int) -> None:
    """`tell(READY=1, STATUS="serving")`. Never waits; a message that cannot be sent is logged and lost."""
    place = os.environ.get("NOTIFY_SOCKET", "")
    if not place:
        return
    address = "\0" + place[1:] if place.startswith("@") else place
    message = "\n".join(f"{name}={value}" for name, value in fields.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(message.encode(), address)
    except OSError as error:
        log.warning("the service manager was not told", what=message, error=error.strerror)
