# SPDX-License-Identifier: Apache-2.0
"""Keys and certificates for TLS, made by certtool and psktool."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.network.servers import needs


def _run(*words: str | Path) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _key(path: Path) -> Path:
    _run("certtool", "--generate-privkey", "--key-type=ecdsa", "--outfile", path)
    return path


class Authority:
    """One that signs. `trusted`: the folder for whoever trusts it."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        needs("certtool")
        self.trusted = folder / name
        self.trusted.mkdir()
        self._key = _key(folder / f"{name}-key.pem")
        self._certificate = self.trusted / "ca-cert.pem"
        words = folder / f"{name}.template"
        words.write_text(f"cn = {name}\nca\ncert_signing_key\nexpiration_days = 10\n")
        _run("certtool", "--generate-self-signed", "--load-privkey", self._key, "--template", words,
             "--outfile", self._certificate)  # fmt: skip

    def server(self, folder: Path, *names: str, expired: bool = False) -> Path:
        """A folder for a server of these names (`dns_name = …`, `ip_address = …`)."""
        folder.mkdir()
        (folder / "ca-cert.pem").write_bytes(self._certificate.read_bytes())
        key, words = _key(folder / "server-key.pem"), folder / "template"
        when = (
            'activation_date = "2020-01-01 00:00:00 UTC"\nexpiration_date = "2020-02-01 00:00:00 UTC"\n'
            if expired
            else "expiration_days = 10\n"
        )
        uses = "cn = server\ntls_www_server\nsigning_key\nencryption_key\n"
        words.write_text(uses + when + "\n".join(names) + "\n")
        _run("certtool", "--generate-certificate", "--load-privkey", key, "--load-ca-certificate",
             self._certificate, "--load-ca-privkey", self._key, "--template", words,
             "--outfile", folder / "server-cert.pem")  # fmt: skip
        return folder


def pre_shared_key(path: Path, user: str) -> Path:
    needs("psktool")
    _run("psktool", "-u", user, "-p", path)
    return path
