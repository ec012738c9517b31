# SPDX-License-Identifier: Apache-2.0
"""The name of a disk of an NBD server, as the NBD URI specification has it. libnbd takes it as it stands;
here it is looked at for what has to be known of it: which place it names, and whether that is safe."""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, quote, unquote, urlsplit

from vhostsync.errors import ConfigError
from vhostsync.storage.disk import absolute_path

PORT: Final = 10809
SCHEMES: Final = ("nbd", "nbds", "nbd+unix", "nbds+unix")
_FILES: Final = ("socket", "tls-certificates", "tls-psk-file")


@dataclass(frozen=True)
class NbdUri:
    text: str  # wherever the process stands: paths in it are absolute
    scheme: str
    host: str  # of TCP
    port: int
    files: dict[str, Path]  # named in it, by their parameter
    export: str

    @classmethod
    def parse(cls, text: str) -> "NbdUri":
        """ConfigError."""
        try:
            parts = urlsplit(text)
            port = parts.port or PORT
        except ValueError as error:
            raise ConfigError(f"{text} is no NBD URI: {error}.") from error
        if parts.scheme not in SCHEMES or parts.fragment:
            raise ConfigError(f"{text} is no NBD URI; write {', '.join(f'{each}://' for each in SCHEMES)}.")
        if parts.password is not None:
            raise ConfigError("An NBD URI has no password; a pre-shared key is read from tls-psk-file=PATH.")
        files = _files(text, parts)
        if parts.scheme.endswith("+unix"):
            if "socket" not in files:
                raise ConfigError(f"{text} names no socket; write {parts.scheme}:///EXPORT?socket=PATH.")
            if parts.hostname:
                raise ConfigError(f"{text}: a Unix socket is on this host, so the URI names none.")
        elif not parts.hostname or "socket" in files:
            raise ConfigError(f"{text} names no host; write {parts.scheme}://HOST/EXPORT.")
        if not parts.scheme.startswith("nbds") and files.keys() - {"socket"}:
            raise ConfigError(f"{text} names keys or certificates and uses no TLS; write nbds for nbd.")
        query = "&".join(f"{name}={quote(str(path), safe='/')}" for name, path in files.items())
        whole = f"{parts.scheme}://{parts.netloc}{parts.path}" + (f"?{query}" if query else "")
        export = unquote(parts.path).removeprefix("/")
        return cls(whole, parts.scheme, parts.hostname or "", port, files, export)

    @property
    def is_encrypted(self) -> bool:
        return self.scheme.startswith("nbds")

    @property
    def is_on_this_host(self) -> bool:
        if self.scheme.endswith("+unix") or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def place(self) -> str:
        """Which server and which of its exports, whatever else the name says."""
        if self.scheme.endswith("+unix"):
            return f"unix:{os.path.realpath(self.files['socket'])}:{self.export}"
        return f"tcp:{self.host}:{self.port}:{self.export}"


def _files(text: str, parts: SplitResult) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for word in filter(None, parts.query.split("&")):
        name, _, value = word.partition("=")
        if name not in _FILES:
            raise ConfigError(f"{text}: {name} is not known here; there are {', '.join(_FILES)}.")
        found[name] = Path(absolute_path(unquote(value), f"{name} in {text}"))
    return found
