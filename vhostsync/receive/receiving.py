# SPDX-License-Identifier: Apache-2.0
"""What the operator of the receiving host sees and may end."""

from typing import Any

import anyio
import anyio.to_thread

from vhostsync import log as logging
from vhostsync.events import EventHub
from vhostsync.receive.receive_config import ReceiveConfig
from vhostsync.receive.receiver import Receiver, sizes_of
from vhostsync.receive_metrics import receiver_page


class Receiving:
    """One receiver, and when its process ends: told by a signal, or `quit`."""

    def __init__(self, config: ReceiveConfig, receiver: Receiver, listening: str) -> None:
        self._config = config
        self.receiver = receiver
        self.listening = listening
        self.events = EventHub()
        self._stop = anyio.Event()

    def stop(self, *, force: bool = False) -> None:
        self._stop.set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    async def wait_stopped(self) -> None:
        await self._stop.wait()

    def status_line(self) -> str:
        """For the service manager."""
        shown = self.receiver.report()
        if shown["why-not"]:
            return str(shown["why-not"])
        if not shown["owned"]:
            return f"{self._config.blk_file} has no owner yet"
        attached = "attached by" if shown["attached"] else "waiting for"
        return f"{self._config.blk_file} is {attached} {shown['owner']}, generation {shown['generation']}"

    async def query_status(self) -> dict[str, Any]:
        size, kept = await anyio.to_thread.run_sync(sizes_of, self._config.blk_file)
        figures = self.receiver.figures
        return {
            "receiver": str(self._config.blk_file),
            "listening": self.listening,
            "capacity": size,
            "allocated": kept,
            **self.receiver.report(),
            "generations-begun": figures.generations,
            "refused": figures.refused,
            "lost-servers": figures.lost_servers,
            "log-lines-dropped": logging.dropped_lines(),
        }

    async def metrics_page(self) -> str:
        return receiver_page(await self.query_status()).text()
