# SPDX-License-Identifier: Apache-2.0
"""Another host: a network namespace with a link to it, which can be cut."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.network.servers import Nbdkit

_number = itertools.count()


def _root(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"`{' '.join(words)}` ended with {done.returncode}: {done.stdout}{done.stderr}")


class OtherHost:
    """A context manager. `address` is its own."""

    def __init__(self) -> None:
        if os.geteuid() != 0:
            pytest.skip("this test needs root (it makes a network namespace)")
        for program, package in (("ip", "iproute2"), ("nft", "nftables")):
            if shutil.which(program) is None:
                pytest.skip(f"{program} is not installed (package {package})")
        number = next(_number)
        self.name = f"vhs{os.getpid()}n{number}"
        self._link = f"v{os.getpid()}n{number}"
        net = f"10.{100 + os.getpid() % 100}.{(os.getpid() // 100 + number) % 250}"
        self.address = f"{net}.2"
        self._ours = f"{net}.1"

    def inside(self, *words: str | Path) -> list[str | Path]:
        return ["ip", "netns", "exec", self.name, *words]

    def _nft(self, words: str) -> None:
        _root("ip", "netns", "exec", self.name, "nft", words)

    def cut(self, how: str = "drop") -> None:
        """`how`: in silence, or with `reject with tcp reset`."""
        self._nft(f"add rule inet cut input meta l4proto tcp {how}")
        if how == "drop":
            self._nft("add rule inet cut output meta l4proto tcp drop")

    def mend(self) -> None:
        self._nft("flush table inet cut")

    def __enter__(self) -> Self:
        _root("ip", "netns", "add", self.name)
        try:
            _root("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
            _root("ip", "addr", "add", f"{self._ours}/30", "dev", self._link)
            _root("ip", "link", "set", self._link, "up")
            inside = ("ip", "-n", self.name)
            _root(*inside, "addr", "add", f"{self.address}/30", "dev", "eth0")
            _root(*inside, "link", "set", "eth0", "up")
            self._nft(
                "table inet cut { chain input { type filter hook input priority 0; }; "
                "chain output { type filter hook output priority 0; }; }"
            )
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _root("ip", "netns", "del", self.name)  # and the link with it


class NbdkitThere(Nbdkit):
    """nbdkit on another host, in plain text."""

    def __init__(self, host: OtherHost, folder: Path, *plugin: str, filters: tuple[str, ...] = ()) -> None:
        super().__init__(folder, *plugin, filters=filters, port=10809)
        self._there = host
        self.host = host.address

    def words(self) -> list[str | Path]:
        words = [str(word).replace("127.0.0.1", self.host) for word in super().words()]
        return self._there.inside(*words)

    def _listens(self) -> bool:
        assert self.process is not None
        sockets = Path(f"/proc/{self.process.pid}/net/tcp").read_text()
        return f":{self.port:04X} 00000000:0000 0A" in sockets
