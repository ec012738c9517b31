# SPDX-License-Identifier: Apache-2.0
"""The process of `receive`: what starts and stops in which order.

Beginning: another user (--user), then everything as that one: the state and its lock, the image and its lock,
the sockets. Then what this process may still do shrinks, and owners are let in. End (SIGTERM, SIGINT,
`quit`): owners are let in no more, the server is told to write back and end, and the disk is free.
"""

import os
import shutil
import socket
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
import anyio.abc
import anyio.to_thread
import structlog

from vhostsync import events
from vhostsync import log as logging
from vhostsync.confine.privileges import Confinement, Programs, change_user, find_user, real_path
from vhostsync.control.command import Dispatcher
from vhostsync.control.scrape import serve_page
from vhostsync.control.server import serve_control
from vhostsync.errors import ConfigError
from vhostsync.host.service_manager import ServiceManager
from vhostsync.host.signals import watch_signals
from vhostsync.receive.nbd_server import PROGRAMS, check_programs, make_folder
from vhostsync.receive.operator_commands import OPERATOR_COMMANDS
from vhostsync.receive.owners import Certificates, Owners
from vhostsync.receive.ownership import OwnershipFile
from vhostsync.receive.receive_config import Address, ReceiveConfig
from vhostsync.receive.receiver import Receiver
from vhostsync.receive.receiving import Receiving
from vhostsync.record.state_index import default_directory, make_directory
from vhostsync.storage import kinds

log = structlog.get_logger(__name__)

BACKLOG: Final = 64
NULL: Final = Path(os.devnull)
# A peer whose host is gone is noticed after about half a minute, and its server ends.
KEEP_ALIVE: Final = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))
UNANSWERED_MS: Final = 30_000


def run(config: ReceiveConfig) -> int:
    """Receive until told to stop; the exit code. Errors at the start are one sentence on stderr, and 1."""
    logging.configure(config.log_format, config.log_level)
    return logging.run_to_its_end(lambda: anyio.run(_receive, config, _start(config)))


@dataclass(frozen=True)
class Started:
    receiver: Receiver
    certificates: Certificates
    control: socket.socket
    confinement: Confinement
    manager: ServiceManager
    undo: ExitStack


def _start(config: ReceiveConfig) -> Started:
    """Blocks. VhostsyncError: nothing is left open."""
    check_programs()
    user = find_user(config.user) if config.user is not None else None
    if user is not None:
        change_user(user)
    _load_modules(config)
    with ExitStack() as undo:
        manager = ServiceManager()
        undo.callback(manager.close)
        certificates = Certificates(config.tls_certificates)
        certificates.context()
        control = _listen("--listen", config.listen)
        undo.callback(control.close)
        data = _listen("--data-port", Address(config.listen.host, config.wanted_data_port))
        undo.callback(data.close)
        state = config.state_file or _state_of(config.blk_file)
        file = OwnershipFile(state)
        ownership = file.open()
        undo.callback(file.close)
        make_folder(file.key_folder)
        receiver = Receiver(config.blk_file, file, ownership, data, may_create=config.create)
        receiver.open()
        confinement = Confinement(config, _places_of(config, state), programs=_programs(config))
        confinement.confine()
        return Started(receiver, certificates, control, confinement, manager, undo.pop_all())


def _load_modules(config: ReceiveConfig) -> None:
    """What is loaded when it is first used: now, while every file can still be read."""
    for name in dir(anyio):
        getattr(anyio, name)
    anyio.run(anyio.sleep, 0)  # and its event loop
    kinds.kind_of(str(config.blk_file))  # and the disk's kind


def _state_of(image: Path) -> Path:
    """Beside an image file; of a block device in the state directory."""
    if not image.is_block_device():
        return Path(f"{image}.receive")
    directory = default_directory()
    make_directory(directory)
    return directory / f"{str(image).strip('/').replace('/', '-')}.receive"


def _places_of(config: ReceiveConfig, state: Path) -> tuple[Path, ...]:
    """What is written to: beside the image and the state; a block device alone, and not all of /dev."""
    image = real_path(config.blk_file)
    found = [image if image.is_block_device() else image.parent, config.blk_file.parent, state.parent, NULL]
    if image.is_block_device():
        found.remove(config.blk_file.parent)
    for file in (config.control_path, config.metrics):
        if isinstance(file, Path):
            found.append(file.parent)
    return tuple(dict.fromkeys(real_path(place) for place in found))


def _programs(config: ReceiveConfig) -> Programs:
    """The server of the disk's bytes and what starts it, with their libraries and what those are configured
    by."""
    found = (shutil.which(name) for name in PROGRAMS)
    run = [Path(each).resolve() for each in found if each is not None]
    return Programs(
        run=(*run, *(Path(place).resolve() for place in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"))),
        read=(*map(Path, ("/etc/gnutls", "/etc/crypto-policies", "/etc/ssl")), config.tls_certificates),
    )  # fmt: skip


def _listen(option: str, where: Address) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    except OSError as error:
        raise ConfigError(f"{option}: no such address, {where.host}: {error.strerror or error}.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections have these too, also those that qemu-nbd accepts.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE:
            listener.setsockopt(socket.IPPROTO_TCP, name, value)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED_MS)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"{option}: cannot listen on {where}: {error.strerror}.") from error
    return listener


async def _receive(config: ReceiveConfig, started: Started) -> None:
    receiver = started.receiver
    place = started.control.getsockname()
    receiving = Receiving(config, receiver, str(Address(place[0], place[1])))
    with started.undo:
        started.confinement.seal()
        logging.write_in_background()
        async with anyio.create_task_group() as lasting:
            await lasting.start(receiver.run)
            await lasting.start(watch_signals, receiving)
            async with anyio.create_task_group() as serving:
                await _serve_operator(config, receiving, serving)
                serving.start_soon(Owners(receiver, started.certificates).run, started.control)
                log.info("receiving", disk=str(config.blk_file), listening=receiving.listening)
                await serving.start(started.manager.follow, receiving.status_line, receiving.events)
                await receiving.wait_stopped()
                receiving.events.publish(events.SHUTDOWN, {"force": False})
                started.manager.tell(STOPPING=1, STATUS="ending the disk's server")
                serving.cancel_scope.cancel()
            await receiver.close()
            lasting.cancel_scope.cancel()
    with suppress(OSError):
        log.info("ended", disk=str(config.blk_file))


async def _serve_operator(
    config: ReceiveConfig, receiving: Receiving, tasks: anyio.abc.TaskGroup
) -> None:
    if (path := config.control_path) is not None:

        async def control(*, task_status: anyio.abc.TaskStatus[None]) -> None:
            commands = Dispatcher(OPERATOR_COMMANDS, receiving)
            await serve_control(path, receiving.events, commands, task_status=task_status)

        await tasks.start(control)
    if config.metrics is not None:
        await tasks.start(serve_page, config.metrics, receiving.metrics_page)
