# SPDX-License-Identifier: Apache-2.0
"""Where the second disk of a fault run lies, and what may happen there: a table of faults for each place. A
fault takes as long as it takes, and is mended when it returns."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tests.daemon.rig import image
from tests.guest.qmp_client import Qmp
from tests.network.ceph_cluster import CephCluster
from tests.network.links import OtherHost
from tests.network.receivers import Authority, Receiving
from tests.network.unit import NbdkitUnit

if TYPE_CHECKING:
    from tests.network.fault_run import FaultRun

MOMENT_S, LONG_S = 0.2, 2.0
PORT = 7070
Fault = Callable[["FaultRun"], None]


def hold(seconds: float) -> None:
    """So long the fault itself lasts."""
    time.sleep(seconds)


class Place:
    """A context manager. `name`: how vhostsync names the disk; `options`: what a backend needs for it."""

    name: str
    create = False
    options: Sequence[str] = ()
    timeout_s = 1.0  # the backend's --destination-timeout: between a moment and long

    def faults(self) -> Mapping[str, Fault]:
        raise NotImplementedError

    def grow(self, disk_bytes: int) -> None:
        """The disk there; the next connection sees it."""
        raise NotImplementedError

    def lose_connection(self) -> None:
        """The next one has to be let in. Nothing where there is none."""

    def content(self) -> Path:
        """What the disk there holds, when nobody has it any more."""
        raise NotImplementedError

    def processes(self) -> Mapping[str, int]:
        """Those beside the backend in which nothing may pile up."""
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Certificates:
    """A folder's name, behind which lie those that are valid, or those that have expired."""

    def __init__(self, authority: Authority, folder: Path, side: str, address: str) -> None:
        self.folder = folder
        self._valid = authority.issue(folder.with_name(f"{folder.name}.valid"), side, names=(address,))
        self._expired = authority.issue(
            folder.with_name(f"{folder.name}.expired"), side, names=(address,), expired=True
        )
        self._show(self._valid)

    def _show(self, which: Path) -> None:
        fresh = self.folder.with_suffix(".new")
        fresh.symlink_to(which)
        fresh.rename(self.folder)

    def expire(self) -> None:
        self._show(self._expired)

    def renew(self) -> None:
        self._show(self._valid)


class OverLink(Place):
    """On another host, with a link to it."""

    def __init__(self, folder: Path, mib: int) -> None:
        self._folder = folder
        self._mib = mib
        self._host = OtherHost()

    def __enter__(self) -> Self:
        self._host.__enter__()
        try:
            self._set_up()
        except BaseException:
            self._host.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tear_down()
        self._host.__exit__(kind, error, trace)

    def _set_up(self) -> None:
        raise NotImplementedError

    def _tear_down(self) -> None:
        raise NotImplementedError

    def faults(self) -> Mapping[str, Fault]:
        return {"reset": self._reset, "silence": self._silence}

    def _reset(self, _: FaultRun) -> None:
        self._host.cut("reject with tcp reset")
        hold(MOMENT_S)
        self._host.mend()

    def _silence(self, _: FaultRun) -> None:
        self._host.cut()
        hold(LONG_S)
        self._host.mend()


class NbdPlace(OverLink):
    """nbdkit behind TLS, which forgets what was not flushed when it ends; the backend's fence ends it."""

    def _set_up(self) -> None:
        self._raw = image(self._folder / "b.img", self._mib, filled_mib=0)
        authority = Authority(self._folder / "ca")
        self._certificates = Certificates(authority, self._folder / "pki", "server", self._host.address)
        trusted = authority.issue(self._folder / "trusted")
        self._server = NbdkitUnit(self._folder, self._raw, self._host, self._certificates.folder, trusted)
        self._server.__enter__()
        self.name = self._server.uri
        self.options = ("--fence-command", self._server.restart_command)

    def _tear_down(self) -> None:
        self._server.__exit__(None, None, None)

    def faults(self) -> Mapping[str, Fault]:
        return {
            **super().faults(),
            "server killed": lambda _: self.lose_connection(),
            "server stopped for long": lambda _: self._stop_for(LONG_S),
            "server stopped for a moment": lambda _: self._stop_for(MOMENT_S),
            "certificate expired": self._expire,
        }

    def lose_connection(self) -> None:
        self._server.signal(signal.SIGKILL)
        self._server.restart()

    def _stop_for(self, seconds: float) -> None:
        self._server.signal(signal.SIGSTOP)
        hold(seconds)
        with suppress(ProcessLookupError):  # the fence may have ended it meanwhile
            self._server.signal(signal.SIGCONT)

    def _expire(self, run: FaultRun) -> None:
        self._certificates.expire()
        run.await_refusal("the certificate of its server is refused", "expired")
        self._certificates.renew()
        self._server.restart()

    def grow(self, disk_bytes: int) -> None:
        os.truncate(self._raw, disk_bytes)
        self.lose_connection()

    def content(self) -> Path:
        return self._raw


class ReceivePlace(OverLink):
    """A `vhostsync receive`, and the server process of its generation."""

    create = True

    def _set_up(self) -> None:
        self._there = self._folder / "other"
        self._there.mkdir()
        address = self._host.address
        authority = Authority(self._folder / "ca")
        self._certificates = Certificates(authority, self._folder / "pki", "client", address)
        self._servers = authority.issue(self._folder / "servers", "server", names=(address,))
        self.name = f"receive://{address}:{PORT}?tls-certificates={self._certificates.folder}"
        self._receiving = self._begin()

    def _begin(self) -> Receiving:
        return Receiving(
            self._there, self._there / "b.img", self._servers, "--create",
            host=self._host.address, port=PORT, before=self._host.inside(),
        )  # fmt: skip

    def _tear_down(self) -> None:
        self._receiving.process.kill()

    def faults(self) -> Mapping[str, Fault]:
        return {
            **super().faults(),
            "server killed": lambda _: self.lose_connection(),
            "server stopped for long": lambda _: self._stop_server(LONG_S),
            "server stopped for a moment": lambda _: self._stop_server(MOMENT_S),
            "receive killed": self._restart,
            "receive stopped for long": self._stop_receive,
            "certificate expired": self._expire,
        }

    def _server(self) -> int | None:
        server: int | None = self._receiving.status()["server"]
        return server

    def lose_connection(self) -> None:
        self._signal_server(signal.SIGKILL)

    def _signal_server(self, number: signal.Signals) -> None:
        server = self._server()
        with suppress(ProcessLookupError):
            if server is not None:
                os.kill(server, number)

    def _stop_server(self, seconds: float) -> None:
        server = self._server()
        if server is None:
            return
        with suppress(ProcessLookupError):  # the next generation ends it
            os.kill(server, signal.SIGSTOP)
            hold(seconds)
            os.kill(server, signal.SIGCONT)

    def _restart(self, run: FaultRun) -> None:
        run.let_rest("receive", self._receiving.process.pid, self._use_a_thread)
        self._receiving.process.kill()
        run.forget_holding("receive")
        self._receiving = self._begin()

    def _use_a_thread(self) -> None:
        """The disk is looked at in one."""
        with Qmp(self._receiving.control) as qmp:
            qmp.execute("query-status")

    def _stop_receive(self, _: FaultRun) -> None:
        self._receiving.process.signal(signal.SIGSTOP)
        hold(LONG_S)
        self._receiving.process.signal(signal.SIGCONT)

    def _expire(self, run: FaultRun) -> None:
        self._certificates.expire()
        run.await_refusal("the certificate of this one has expired")
        self._certificates.renew()

    def grow(self, disk_bytes: int) -> None:
        with Qmp(self._receiving.control) as qmp:
            qmp.execute("resize", size=disk_bytes)

    def content(self) -> Path:
        return self._there / "b.img"

    def processes(self) -> Mapping[str, int]:
        return {"receive": self._receiving.process.pid}


class CephPlace(Place):
    """An image of a cluster whose daemons fail, and which shuts its client out."""

    create = True
    timeout_s = 3.0  # its daemons take their time on a busy machine

    def __init__(self, folder: Path, cluster: CephCluster) -> None:
        self._folder, self._cluster = folder, cluster
        self._image = f"rbd/faults{os.getpid()}"
        self.name = f"rbd:{self._image}"

    def faults(self) -> Mapping[str, Fault]:
        def held(failure: Callable[[], AbstractContextManager[None]], seconds: float) -> Fault:
            def happen(_: FaultRun) -> None:
                with failure():
                    hold(seconds)

            return happen

        return {
            "OSDs stopped for long": held(self._cluster.osds_stopped, self.timeout_s + LONG_S),
            "OSDs stopped for a moment": held(self._cluster.osds_stopped, MOMENT_S),
            "OSDs killed": held(self._cluster.osds_killed, MOMENT_S),
            "monitor killed": held(self._cluster.monitor_killed, MOMENT_S),
            "cluster full": held(self._cluster.full, self.timeout_s + LONG_S),
            "client shut out": self._shut_out,
        }

    def _shut_out(self, _: FaultRun) -> None:
        status = json.loads(self._cluster.rbd("status", self._image, "--format", "json"))
        for watcher in status["watchers"]:
            self._cluster.ceph("osd", "blocklist", "add", watcher["address"], "3600")

    def grow(self, disk_bytes: int) -> None:
        self._cluster.rbd("resize", "--no-progress", self._image, "--size", f"{disk_bytes >> 20}M")

    def content(self) -> Path:
        exported = self._folder / "exported"
        self._cluster.rbd("export", "--no-progress", self._image, str(exported))
        return exported
