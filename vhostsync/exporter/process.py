# SPDX-License-Identifier: Apache-2.0
"""The process of `exporter`: a scrape asks all backends at once, and makes one page of what they answer.

It holds no state but who has not answered yet, changes nothing, and asks for nothing but figures."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import anyio
import anyio.abc
import structlog

from vhostsync import log as logging
from vhostsync.control.scrape import serve_page
from vhostsync.exporter.backends import Asked, Place, Surroundings
from vhostsync.exporter.exporter_config import ExporterConfig
from vhostsync.host.service_manager import ServiceManager
from vhostsync.host.signals import watch_signals
from vhostsync.metrics_page import Family, Page
from vhostsync.option_values import TcpAddress

log = structlog.get_logger(__name__)

UP: Final = Family("up", "gauge", "1 if the disk's backend has answered in time.", ("vm",))
COLLECTION: Final = Family(
    "exporter_collection_seconds", "gauge", "How long this page took: to ask all backends, and to write it."
)
STOPPED: Final = Family(
    "stopped", "gauge", "1 if the disk has a name here (`vhostsync create`) and no backend of it listens.",
    ("vm",),
)  # fmt: skip
FAMILIES: Final = (UP, STOPPED, COLLECTION)


class Exporter:
    """All backends of the host, over the scrapes."""

    def __init__(self, config: ExporterConfig, tasks: anyio.abc.TaskGroup) -> None:
        self._config = config
        self._surroundings = Surroundings(config.directories, tasks)
        self._tasks = tasks
        self._asked: dict[str, Asked] = {}

    async def page(self) -> str:
        began = anyio.current_time()
        around = await self._surroundings.found(self._config.deadline_s)
        backends = self._known(around.places)
        page = Page()
        up, stopped = page.family(UP), page.family(STOPPED)
        for name in around.stopped:
            stopped(1, name)
        for each in backends.values():
            each.ask()
        for name, each in backends.items():
            found = await each.wait(self._config.deadline_s)
            up(int(found is not None), name)
            stopped(0, name)
            if found is not None:
                page.take(found)
        page.one(COLLECTION, round(anyio.current_time() - began, 6))
        return page.text()

    def _known(self, places: list[Place]) -> Mapping[str, Asked]:
        """By name. Who is gone is forgotten, and a question to it with it."""
        former, self._asked = self._asked, {}
        for place in places:
            before = former.get(place.name)
            asked = before if before is not None and before.place.is_of(place) else Asked(place, self._tasks)
            asked.place = place  # another process may hold the lock of its record by now
            self._asked[place.name] = asked
        return self._asked


class Process:
    """When it ends: told by a signal."""

    def __init__(self) -> None:
        self._stop = anyio.Event()

    def stop(self, *, force: bool = False) -> None:
        self._stop.set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    async def wait_stopped(self) -> None:
        await self._stop.wait()


def run(config: ExporterConfig) -> int:
    """Serve the page until told to stop, or print it; the exit code."""
    logging.configure(config.log_format, config.log_level)
    return logging.run_to_its_end(lambda: anyio.run(_print_once if config.once else _serve, config))


async def _print_once(config: ExporterConfig) -> None:
    async with anyio.create_task_group() as tasks:
        sys.stdout.write(await Exporter(config, tasks).page())
        tasks.cancel_scope.cancel()


async def _serve(config: ExporterConfig) -> None:
    process, manager = Process(), ServiceManager()
    logging.write_in_background()
    async with anyio.create_task_group() as tasks:
        await tasks.start(watch_signals, process)
        page = Exporter(config, tasks).page
        where: Path | TcpAddress = await tasks.start(serve_page, config.listen, page, config.deadline_s)
        manager.tell(READY=1, STATUS=f"serving metrics on {where}")
        await process.wait_stopped()
        manager.tell(STOPPING=1)
        tasks.cancel_scope.cancel()
    manager.close()
    log.info("ended")
