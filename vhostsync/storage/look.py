# SPDX-License-Identifier: Apache-2.0
"""A look at a disk that a state record knows, without opening it for anything: is it there, is it that disk,
does it answer, who has it. For the worst day: a disk may be dead, or hang whoever touches it. So a process of
its own looks, which is left behind where it does not come back."""

import json
import os
import select
import signal
from collections.abc import Callable
from dataclasses import asdict
from typing import Final

from vhostsync.storage import kinds
from vhostsync.storage.condition import Condition, Look
from vhostsync.storage.identity import DiskIdentity

LOOK_S: Final = 5.0


def look(disk: DiskIdentity, timeout_s: float = LOOK_S) -> Look:
    """Blocks, no longer than `timeout_s`. The process must have no other thread."""
    text = _in_a_child(lambda: json.dumps(asdict(kinds.look(disk))).encode(), timeout_s)
    if text is None:
        return Look(Condition.FAILING, f"no answer within {timeout_s:g} s")
    found = json.loads(text)
    return Look(Condition(found["condition"]), found["reason"], tuple(found["users"]))


def _in_a_child(make: Callable[[], bytes], timeout_s: float) -> bytes | None:
    """What `make` returns in a child; None if that does not end in time, or dies."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            os.write(writer, make())  # a few hundred bytes: a pipe has room for them
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], timeout_s)
        text = os.read(reader, 65536) if ready else b""
    finally:
        os.close(reader)
    if text:
        os.waitpid(child, 0)
        return text
    # It may hang in the kernel, where no signal reaches it: nobody waits for it.
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, os.WNOHANG)
    return None
