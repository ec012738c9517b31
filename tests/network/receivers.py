# SPDX-License-Identifier: Apache-2.0
"""`vhostsync receive` as a process, certificates for both sides, and what plays its owner where that is not a
real backend: commands by hand, and qemu-io as the client of the data."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.guest.backends import vhostsync_command
from tests.guest.processes import Process, ProcessError, wait_said
from tests.guest.qmp_client import Qmp

needs_programs = [
    pytest.mark.skipif(shutil.which("certtool") is None, reason="needs certtool (gnutls-bin)"),
    pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="needs qemu-nbd (qemu-utils)"),
]
WAIT_S = 60.0
HOST = "127.0.0.1"
EXPIRED = (("activation", "0-01-01"), ("expiration", "1-01-01"))


class Authority:
    """A CA, and what it signs. `issue` fills a directory for one side under the usual names."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        self._folder = folder
        folder.mkdir()
        self._write("ca.template", f"cn = {name}\nca\ncert_signing_key\n")
        self._run("--generate-privkey", "--key-type=ecdsa", "--outfile", "ca-key.pem")
        self._run(
            "--generate-self-signed", "--template", "ca.template", "--load-privkey", "ca-key.pem",
            "--outfile", "ca-cert.pem",
        )  # fmt: skip

    def issue(
        self, folder: Path, *sides: str, names: Sequence[str] = (HOST,), expired: bool = False
    ) -> Path:
        folder.mkdir(exist_ok=True)
        shutil.copy(self._folder / "ca-cert.pem", folder)
        for side in sides:
            lines = [f"cn = the {side}", f"tls_www_{side}", "signing_key", "encryption_key"]
            lines += [f"{'ip_address' if each[0].isdigit() else 'dns_name'} = {each}" for each in names]
            if expired:
                lines += [f'{what}_date = "202{year} 00:00:00"' for what, year in EXPIRED]
            self._write(f"{side}.template", "\n".join(lines) + "\n")
            key, certificate = folder / f"{side}-key.pem", folder / f"{side}-cert.pem"
            self._run("--generate-privkey", "--key-type=ecdsa", "--outfile", key)
            self._run(
                "--generate-certificate", "--template", f"{side}.template", "--load-privkey", key,
                "--load-ca-certificate", "ca-cert.pem", "--load-ca-privkey", "ca-key.pem",
                "--outfile", certificate,
            )  # fmt: skip
        return folder

    def _write(self, name: str, text: str) -> None:
        (self._folder / name).write_text(text)

    def _run(self, *words: str | Path) -> None:
        subprocess.run(["certtool", "--no-text", *words], cwd=self._folder, check=True, capture_output=True)


class Receiving:
    """A `vhostsync receive` that lets owners in."""

    def __init__(
        self, folder: Path, image: Path, certificates: Path, *options: str | Path, host: str = HOST,
        port: int = 0, before: Sequence[str | Path] = (),
    ) -> None:
        self.image, self.certificates, self.host = image, certificates, host
        self.control = folder / "receive.control"
        self.log = folder / "receive.log"
        self.log.unlink(missing_ok=True)
        self.process = Process(
            "vhostsync receive",
            [
                *before, *vhostsync_command(), "receive", "--blk-file", image, "--listen", f"{host}:{port}",
                "--tls-certificates", certificates, "--control", self.control, *options,
            ],
            self.log,
            env={"STATE_DIRECTORY": str(folder / "state")},
        )  # fmt: skip
        try:
            said = json.loads(wait_said(self.process, '"message": "receiving"'))
        except BaseException:
            self.process.kill()
            raise
        self.port = int(said["listening"].rpartition(":")[2])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        if kind is not None:
            print(f"--- the last output of receive:\n{self.process.last_output(60)}")

    def status(self) -> dict[str, Any]:
        with Qmp(self.control) as qmp:
            found: dict[str, Any] = qmp.execute("query-status")
            return found

    def await_status(self, what: str, **wanted: Any) -> dict[str, Any]:
        """Names with underscores for dashes."""
        deadline = time.monotonic() + WAIT_S
        while True:
            found = self.status()
            if all(found[name.replace("_", "-")] == value for name, value in wanted.items()):
                return found
            assert time.monotonic() < deadline, (what, found)
            time.sleep(0.02)

    def stop(self) -> None:
        code = self.process.terminate(WAIT_S)
        if code != 0:
            raise ProcessError(f"receive ended with {code}:\n{self.process.last_output()}")

    def connect(self, certificates: Path | None = None) -> Asking:
        return Asking(self.host, self.port, certificates or self.certificates)

    def ask(self, command: str, **arguments: Any) -> Any:
        """One command on a connection of its own. Refused."""
        with self.connect() as asking:
            return asking.ask(command, **arguments)

    def begin(self, owner: Owner) -> dict[str, Any]:
        """As a backend does, which knows what it has recorded and which generation it has had."""
        known = {"token": owner.token, "disk": owner.disk, "generation": owner.generation}
        shown = {name: value for name, value in known.items() if value is not None}
        begun: dict[str, Any] = self.ask("begin", instance=owner.instance, **shown)
        if owner.token is None:
            owner.token = f"token of {owner.instance}"
            self.ask("own", disk=begun["disk"], generation=begun["generation"], token=owner.token)
        owner.disk, owner.generation = begun["disk"], begun["generation"]
        return begun


class Owner:
    """What a backend remembers: `token` and `disk` in its record, `generation` as long as it runs."""

    def __init__(self, instance: str, *, token: str | None = None, disk: str | None = None) -> None:
        self.instance, self.token, self.disk = instance, token, disk
        self.generation: int | None = None

    def successor(self, instance: str) -> Owner:
        return Owner(instance, token=self.token, disk=self.disk)


class RefusedError(Exception):
    """The receiver's sentence."""


class Asking:
    """A connection of an owner."""

    def __init__(self, host: str, port: int, certificates: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(certificates / "ca-cert.pem")
        if (certificates / "client-cert.pem").exists():
            context.load_cert_chain(certificates / "client-cert.pem", certificates / "client-key.pem")
        plain = socket.create_connection((host, port), WAIT_S)
        try:
            self.socket = context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.socket.close()

    def send(self, text: bytes) -> None:
        self.socket.sendall(text)

    def line(self) -> bytes:
        return self._file.readline()

    def ask(self, command: str, **arguments: Any) -> Any:
        self.send(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        line = self.line()
        if not line:
            raise ConnectionError("the connection was closed")
        answer = json.loads(line)
        if "error" in answer:
            raise RefusedError(answer["error"]["desc"])
        return answer["return"]


class Data:
    """A client of a generation's data: qemu-io, which is told one command after the other."""

    def __init__(self, folder: Path, begun: dict[str, Any], host: str = HOST) -> None:
        keys = folder / f"keys-{begun['generation']}-{begun['key'][:8]}"
        keys.mkdir(exist_ok=True)
        (keys / "keys.psk").write_text(f"{begun['user']}:{begun['key']}\n")
        self._process = subprocess.Popen(
            [
                "setpriv", "--pdeathsig", "KILL", "qemu-io", "--object",
                f"tls-creds-psk,id=key,endpoint=client,dir={keys},username={begun['user']}", "--image-opts",
                f"driver=nbd,host={host},port={begun['port']},export={begun['export']},tls-creds=key",
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")
        self._process.stdin.flush()

    def do(self, command: str, *, says: bytes) -> None:
        """And wait until it says that it is done."""
        self.send(command)
        assert self._process.stdout is not None
        said = b""
        while says not in said:
            line = self._process.stdout.readline()
            assert line, f"qemu-io has ended, and said {said!r}"
            said += line

    def write(self, offset: int, length: int, pattern: int) -> None:
        """Durable on return."""
        self.do(f"write -P {pattern} {offset} {length}", says=b"wrote")
        self.send("flush")
        self.do("length", says=b"iB")

    def leave(self) -> str:
        """All that it has said."""
        said, _ = self._process.communicate(b"quit\n", WAIT_S)
        return said.decode()


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found
