# SPDX-License-Identifier: Apache-2.0
"""The task tree of `serve`: what starts and stops in which order.

Beginning: the disk is opened and locked (nothing is touched before the lock is held), the state record says
whether it is the right one, the engine starts, the sockets open. End (SIGTERM, SIGINT, `quit`, or the only
frontend of --fd gone): frontends are let go first, which finishes their requests; the mirror is brought up to
date; the engine ends; the record notes the clean end.

What the process may do shrinks on the way (privileges.py); that is why all of the beginning happens before
there is an event loop, in the only thread.

    run ── device.run, signals                          (to the very end)
        └─ device.serve ─ one task a frontend           (until the end begins)
        └─ control socket, metrics, the service manager (until the end begins)
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio
import anyio.abc
import anyio.to_thread
import structlog

from vhostsync import events
from vhostsync import log as logging
from vhostsync.config import ServeConfig
from vhostsync.confine.privileges import Confinement, change_user, find_user, network_of, places_of
from vhostsync.control.commands import dispatcher
from vhostsync.control.server import serve_control
from vhostsync.device.device import Device, start_engine
from vhostsync.device.opening import Opened, open_device
from vhostsync.engine.engine import Engine
from vhostsync.errors import ConfigError, HandOverError
from vhostsync.group_members import OtherMembers
from vhostsync.hand_over import ENVIRONMENT, Inheritance, Predecessor, Successor, ask
from vhostsync.host import directory as own_directory
from vhostsync.host import patience
from vhostsync.host.errands import bring_in_time
from vhostsync.host.owned_fd import OwnedFd
from vhostsync.host.service_manager import ServiceManager
from vhostsync.host.signals import watch_signals
from vhostsync.lineage_name import is_lineage_name, socket_of
from vhostsync.metrics import serve_metrics
from vhostsync.option_values import TakeOver
from vhostsync.record.names import Member, follow_name
from vhostsync.record.state_index import default_directory, know_pointers_beside, make_directory
from vhostsync.storage import kinds
from vhostsync.storage.network import use_network
from vhostsync.storage.signatures import load_library
from vhostsync.typed_fields import is_text
from vhostsync.vhost_user import listener
from vhostsync.vhost_user.heritage import Heritage

log = structlog.get_logger(__name__)

SOURCE_S = 5.0
"""How long the end waits for the source: longer than the destination may take, or once it is forced."""

POINTERS_S = 5.0
"""How long it may take to read what leads to records, before a guest is taken over."""

RELEASE_S = 10.0  # frontends that are not let go of in this time connect again to the successor


def run(config: ServeConfig, take_over: TakeOver = TakeOver.NOTHING) -> int:
    """Serve until told to stop; the exit code. Errors at the start are one sentence on stderr, and 1.
    `take_over`: what of the backend that has this control socket (hand_over.py)."""
    logging.configure(config.log_format, config.log_level)
    return logging.run_to_its_end(lambda: _run(config, take_over))


def _run(config: ServeConfig, take_over: TakeOver) -> None:
    taken_over = None
    if take_over is not TakeOver.NOTHING:
        # An answer was for the start of the backend that runs; asked once more, it would be refused, or mean
        # something else.
        config = replace(config, answer=None)
        taken_over = _take_over(follow_name(config), log_too=take_over is TakeOver.GUEST_AND_LOG)
    config = follow_name(config)  # once the predecessor has left its disk, that is certain
    anyio.run(_serve, config, _start(config, taken_over))


@dataclass(frozen=True)
class TakenOver:
    """Of the backend that was there before."""

    predecessor: Predecessor
    inheritance: Inheritance


@dataclass(frozen=True)
class Leaving:
    """To the backend that goes on."""

    successor: Successor
    frontends: Sequence[Heritage]
    equal: bool


@dataclass(frozen=True)
class Started:
    """All that `_serve` needs, before the event loop begins."""

    opened: Opened
    endpoint: listener.Endpoint | None
    engine: Engine
    confinement: Confinement
    manager: ServiceManager
    state_directory: Path | None
    taken_over: TakenOver | None = None


@functools.cache
def load_modules() -> None:
    """What is loaded when it is first used: now, while every file can still be read."""
    for name in dir(anyio):
        getattr(anyio, name)
    anyio.run(anyio.sleep, 0)  # and its event loop
    load_library()


def _take_over(config: ServeConfig, *, log_too: bool) -> TakenOver | None:
    """Blocks. From here on nobody serves the guest, until this does. None: as any other start. ConfigError,
    HandOverError, ControlError: the backend that is there goes on."""
    if config.control_socket is None:
        raise ConfigError("--take-over needs --control, which says whose guest is taken over.")
    load_modules()
    kinds.kind_of(config.disk)  # loads its module: the guest does not wait for that
    get_ready = partial(_know_pointers, config)  # nor for these to be read, which may be many
    predecessor = anyio.run(ask, config.control_socket, config.socket_path, config.disk, get_ready)
    inheritance = predecessor.inherit() if predecessor is not None else None
    if predecessor is None or inheritance is None:
        return None
    os.environ.update(inheritance.environment)
    with inheritance.log as former_log:
        if log_too:
            os.dup2(former_log.fileno(), sys.stderr.fileno())
    return TakenOver(predecessor, inheritance)


def _know_pointers(config: ServeConfig, record: object) -> None:
    """`record`: which the predecessor says that it uses. HandOverError where its directory hangs: the start
    would, too, and the guest wait for it. Not as root in that of another user, who may have put links there.
    Blocks."""
    if config.user is not None or not isinstance(record, str) or not is_text(record):
        return
    try:
        bring_in_time(partial(know_pointers_beside, record), lambda _: None, POINTERS_S)
    except TimeoutError as error:
        raise HandOverError(f"The directory of {record} does not answer, and nothing was changed.") from error
    except OSError as error:
        raise HandOverError(f"Nothing was changed, for {record} cannot be read: {error.strerror}.") from error


def _start(config: ServeConfig, taken_over: TakenOver | None) -> Started:
    """Steps 1 to 4 of privileges.py. Blocks. VhostsyncError: nothing is left open."""
    user = find_user(config.user) if config.user is not None else None
    owner = (user.uid, user.gid) if user is not None else None
    load_modules()
    use_network(config.network_use)
    if config.names_ceph:
        kinds.kind_of("rbd:").keep_files()
    state_directory = None
    if config.state_file is None and not config.no_state_file:
        state_directory = default_directory()  # of whoever started it, before the user is changed
        make_directory(state_directory, owner)
    _make_socket_directory(config, owner)
    with ExitStack() as undo:
        manager = ServiceManager()
        undo.callback(manager.close)
        opened = open_device(
            config, state_directory, lambda: change_user(user) if user is not None else None,
            handed_over_equal=taken_over is not None and taken_over.inheritance.equal,
        )  # fmt: skip
        undo.callback(opened.close)
        use_network(replace(config.network_use, make_certain=opened.fence.make_certain_blocking))
        endpoint = _open_endpoint(config, taken_over)
        if endpoint is not None:
            undo.callback(endpoint.close)
        peer = opened.record.peer if opened.record is not None else None
        disks_known = [opened.disk.identity] if peer is None else [opened.disk.identity, peer]
        names = (config.disk, *(disk.path for disk in disks_known))
        confinement = Confinement(
            config, places_of(config, disks_known, state_directory), network=network_of(config, names)
        )
        opened.disk.end_threads()
        confinement.confine()
        engine = start_engine(config, opened)
        undo.pop_all()
    return Started(opened, endpoint, engine, confinement, manager, state_directory, taken_over)


class Process:
    """When it ends: told by a signal, `quit`, `hand-over`, or the last of its frontends."""

    def __init__(self, control: Path | None) -> None:
        self._control = control
        self._quit = anyio.Event()
        self._forced = anyio.Event()
        self.successor: Successor | None = None

    async def hand_over(self, check: Callable[[], None]) -> None:
        """Begin the end, for a successor that is there, if `check` still passes by then. HandOverError: it is
        not, or this process ends already."""
        if self._control is None or self.stopping:
            raise HandOverError("This backend ends already.")
        successor = await anyio.to_thread.run_sync(Successor, self._control)
        try:
            check()
            if self.stopping:
                raise HandOverError("This backend ends already.")
        except BaseException:
            successor.close()
            raise
        self.successor = successor
        self._quit.set()

    def stop(self, *, force: bool = False) -> None:
        """Begin the end. May be called again, with force."""
        if force:
            self._forced.set()
        self._quit.set()

    @property
    def stopping(self) -> bool:
        return self._quit.is_set()

    @property
    def forced(self) -> bool:
        return self._forced.is_set()

    async def wait_stopped(self) -> None:
        await self._quit.wait()

    async def wait_forced(self) -> None:
        """The end is to be without waiting for the destination."""
        await self._forced.wait()


async def _serve(config: ServeConfig, started: Started) -> None:
    opened, endpoint = started.opened, started.endpoint
    leaving = None
    try:
        try:
            try:
                started.confinement.seal(started.engine.check_rings_restricted)
                logging.write_in_background()
                device, leaving = await _serve_device(config, started)
            finally:
                with anyio.CancelScope(shield=True):
                    await started.engine.close(process_ends=True)
        finally:
            if endpoint is not None and leaving is None:
                endpoint.close()
        await anyio.to_thread.run_sync(device.mirror.record_clean)
    finally:
        await anyio.to_thread.run_sync(opened.close)
        if leaving is None:
            started.manager.close()
    if leaving is not None:
        await _hand_over(leaving, endpoint, started.state_directory)
    log.info("ended", disk=device.mirror.source_path)


def _make_socket_directory(config: ServeConfig, owner: tuple[int, int] | None) -> None:
    """The one that has its place by the disk's name. Its sockets have modes of their own. ConfigError."""
    place = socket_of(config.name).parent if is_lineage_name(config.name) else None
    used = {path.parent for path in (config.socket_path, config.control_socket) if path is not None}
    if place is None or place not in used:
        return
    try:
        own_directory.make_directory(place, owner, mode=0o755)
    except OSError as error:
        raise ConfigError(
            f"the directory for the sockets, {place}, cannot be made: {error.strerror}; name places where "
            f"this user may make them (--socket-path, --control)"
        ) from error


async def _hand_over(
    leaving: Leaving, endpoint: listener.Endpoint | None, state_directory: Path | None
) -> None:
    """All disks are closed. HandOverError: this process has failed, and is to be started again."""
    listening = endpoint if endpoint is not None and endpoint.listening else None
    made = listening is not None and listening.bound is not None
    sock = listening.sock if listening is not None else None
    own_log = OwnedFd(os.dup(sys.stderr.fileno()))
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    if state_directory is not None:
        environment["STATE_DIRECTORY"] = str(state_directory)
    estate = Inheritance(own_log, environment, sock, made, leaving.frontends, leaving.equal)
    await anyio.to_thread.run_sync(leaving.successor.give, estate)
    log.info("handed over", frontends=len(leaving.frontends))


def _open_endpoint(config: ServeConfig, taken_over: TakenOver | None) -> listener.Endpoint | None:
    if taken_over is not None:
        left = taken_over.inheritance
        path = config.socket_path if left.file_is_ours else None
        return listener.inherit(left.listener, path) if left.listener is not None else None
    if config.fd is not None:
        return listener.adopt(config.fd)
    assert config.socket_path is not None
    return listener.listen_at(config.socket_path)


async def _serve_device(config: ServeConfig, started: Started) -> tuple[Device, Leaving | None]:
    opened, process = started.opened, Process(config.control_socket)
    inherited = started.taken_over.inheritance.frontends if started.taken_over is not None else ()
    heirs: list[Heritage] = []
    device = Device(config, opened, started.engine, started.confinement.reach, process)
    if config.group_freeze:
        control = config.control_socket
        directory, record = started.state_directory, config.record_of_name
        assert config.group is not None and directory is not None
        assert control is not None and record is not None
        others = OtherMembers(config.name, config.group, directory, control)
        device.mirror.group_cut.join(Member(config.group, record.name), others)
    async with anyio.create_task_group() as lasting:
        lasting.start_soon(device.run)
        await lasting.start(watch_signals, process)
        async with anyio.create_task_group() as serving:
            await _start_control(config, device, serving)
            serving.start_soon(device.serve, started.endpoint, process.stop, inherited)
            log.info(
                "serving",
                disk=opened.disk.name,
                capacity_bytes=opened.shape.capacity_bytes,
                block_bytes=opened.shape.block_bytes,
                direct=opened.disk.direct,
                socket=str(config.socket_path) if config.socket_path else f"fd {config.fd}",
            )
            for each in inherited:
                await each.taken.wait()
            await serving.start(started.manager.follow, device.status_line, device.events)
            if started.taken_over is not None:
                started.manager.tell(MAINPID=os.getpid())
                # Or it might see its main process end before it hears of this one, and stop all of it.
                await anyio.to_thread.run_sync(started.manager.await_heard)
                await anyio.to_thread.run_sync(started.taken_over.predecessor.tell_serving)
            await process.wait_stopped()
            device.mirror.group_cut.part()
            device.events.publish(events.SHUTDOWN, {"force": process.forced})
            if process.successor is None:  # else all of the service would be stopped after its reload
                started.manager.tell(STOPPING=1)
            started.manager.tell(STATUS="bringing the mirror up to date")
            lasting.start_soon(_abandon_if_forced, process, device)
            if process.successor is not None:
                with anyio.move_on_after(RELEASE_S):
                    heirs = await device.frontends.release()
            lasting.start_soon(_leave_requests_in_time, process, device)
            serving.cancel_scope.cancel()
        await device.detach(force=process.forced)
        lasting.cancel_scope.cancel()
    if process.successor is None:
        return device, None
    return device, Leaving(process.successor, heirs, device.mirror.left_equal)


async def _abandon_if_forced(process: Process, device: Device) -> None:
    await process.wait_forced()
    await device.mirror.abandon()


async def _leave_requests_in_time(process: Process, device: Device) -> None:
    """A source that does not answer keeps no backend from ending: what it has of the guest's requests is left
    as by a kill. None is answered, and a frontend that connects again gives them to the next backend."""
    longest_s = device.config.destination_timeout_s + SOURCE_S
    with contextlib.suppress(TimeoutError), patience.fail_after(longest_s):
        await process.wait_forced()
        await anyio.sleep(SOURCE_S)
    while True:  # also where somebody comes to wait for them only now
        device.engine.leave_requests()
        await anyio.sleep(1)


async def _start_control(config: ServeConfig, device: Device, tasks: anyio.abc.TaskGroup) -> None:
    if config.control_socket is not None:

        async def control(*, task_status: anyio.abc.TaskStatus[None]) -> None:
            assert config.control_socket is not None
            commands = dispatcher(device, config.destination_cache)
            await serve_control(config.control_socket, device.events, commands, task_status=task_status)

        await tasks.start(control)
    if config.metrics is not None:
        await tasks.start(serve_metrics, config.metrics, device)
