# SPDX-License-Identifier: Apache-2.0
"""NBD over TCP with TLS, by certificates and by pre-shared keys, also in the sandbox."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.daemon.rig import Load, Served, flush, image, same_content, write_block
from tests.guest.qmp_client import QmpError
from tests.network.certificates import Authority, pre_shared_key
from tests.network.servers import MIBS, Nbdkit, free_port
from vhostsync.confine import landlock
from vhostsync.host.kernel import Kernel

HERE = "ip_address = 127.0.0.1"


def by_certificates(folder: Path, raw: Path, server: Path, trusted: Path) -> Nbdkit:
    options = ["--tls=require", f"--tls-certificates={server}"]
    tls = f"tls-certificates={trusted}"
    return Nbdkit(folder, "file", str(raw), options=options, port=free_port(), tls=tls)


def by_key(folder: Path, raw: Path, key: Path, own_key: Path, user: str = "vm1") -> Nbdkit:
    options = ["--tls=require", f"--tls-psk={key}"]
    tls = f"{user}@tls-psk-file={own_key}"
    return Nbdkit(folder, "file", str(raw), options=options, port=free_port(), tls=tls)


def mirrors(folder: Path, disk: Path, raw: Path, server: Nbdkit, *options: str | Path) -> None:
    with server, Served(folder, disk, *options) as served:
        with Load(served, blocks=256) as load:
            served.start_mirror(server.uri)
            load.go_on()
            load.stop()
        served.stop()
    assert same_content(disk, raw)


def refusal(folder: Path, disk: Path, server: Nbdkit, uri: str | None = None) -> str:
    with server, Served(folder, disk) as served:
        with pytest.raises(QmpError) as refused:
            served.qmp.execute("mirror-start", destination=uri or server.uri)
        assert served.state == "passthrough"
        with served.guest() as guest:
            write_block(guest, 1, 1)
            flush(guest)
        served.stop()
    said = str(refused.value)
    assert "\n" not in said and "cannot be reached" in said
    return said


def test_by_certificates(tmp_path: Path, disk: Path, raw: Path) -> None:
    authority = Authority(tmp_path)
    server = authority.server(tmp_path / "server", HERE)
    mirrors(tmp_path, disk, raw, by_certificates(tmp_path, raw, server, authority.trusted))


def test_by_a_pre_shared_key(tmp_path: Path, disk: Path, raw: Path) -> None:
    key = pre_shared_key(tmp_path / "keys.psk", "vm1")
    mirrors(tmp_path, disk, raw, by_key(tmp_path, raw, key, key), "--connections", "2")


def test_a_certificate_of_another_name(tmp_path: Path, disk: Path, raw: Path) -> None:
    authority = Authority(tmp_path)
    server = authority.server(tmp_path / "server", "dns_name = other.example.org")
    said = refusal(tmp_path, disk, by_certificates(tmp_path, raw, server, authority.trusted))
    assert "certificate" in said


def test_a_certificate_that_has_expired(tmp_path: Path, disk: Path, raw: Path) -> None:
    authority = Authority(tmp_path)
    server = authority.server(tmp_path / "server", HERE, expired=True)
    said = refusal(tmp_path, disk, by_certificates(tmp_path, raw, server, authority.trusted))
    assert "the certificate of its server is refused: it has expired" in said


def test_a_certificate_of_an_authority_that_is_not_trusted(tmp_path: Path, disk: Path, raw: Path) -> None:
    server = Authority(tmp_path).server(tmp_path / "server", HERE)
    other = Authority(tmp_path, "other")
    said = refusal(tmp_path, disk, by_certificates(tmp_path, raw, server, other.trusted))
    assert "certificate" in said


def test_another_key(tmp_path: Path, disk: Path, raw: Path) -> None:
    key, other = pre_shared_key(tmp_path / "keys.psk", "vm1"), pre_shared_key(tmp_path / "other.psk", "vm1")
    said = refusal(tmp_path, disk, by_key(tmp_path, raw, key, other))
    assert other.read_text().split(":")[1].strip() not in said


def test_a_user_without_a_key(tmp_path: Path, disk: Path, raw: Path) -> None:
    key = pre_shared_key(tmp_path / "keys.psk", "vm1")
    refusal(tmp_path, disk, by_key(tmp_path, raw, key, key, user="vm2"))


def test_plain_text_where_tls_is_wanted_and_otherwise(tmp_path: Path, disk: Path, raw: Path) -> None:
    key = pre_shared_key(tmp_path / "keys.psk", "vm1")
    server = by_key(tmp_path, raw, key, key)
    refusal(tmp_path, disk, server, f"nbd://127.0.0.1:{server.port}/")
    plain = Nbdkit(tmp_path, "file", str(raw), port=free_port(), name="plain")
    refusal(tmp_path, disk, plain, f"nbds://vm1@127.0.0.1:{plain.port}/?tls-psk-file={key}")


def need_landlock() -> None:
    version = landlock.abi(Kernel())
    if version < 4:
        pytest.skip(f"THIS TEST IS LEFT OUT, as this kernel has version {version} of Landlock, not 4")


def test_in_the_sandbox(tmp_path: Path, disk: Path, raw: Path) -> None:
    """All is withheld but what was said: a port for a destination, and where its certificates are."""
    need_landlock()
    authority = Authority(tmp_path)
    (tmp_path / "run").mkdir()
    own = image(tmp_path / "run" / "a.img", MIBS)
    server = by_certificates(tmp_path, raw, authority.server(tmp_path / "server", HERE), authority.trusted)
    options = ["--sandbox", "require", "--allow-port", str(server.port)]
    with server, Served(tmp_path / "run", own, *options) as served:
        with pytest.raises(QmpError, match=f"--allow-path {authority.trusted}"):
            served.qmp.execute("mirror-start", destination=server.uri)
        with pytest.raises(QmpError, match="--allow-port 7"):
            served.qmp.execute("mirror-start", destination="nbds://127.0.0.1:7/")
        served.stop()
    mirrors(tmp_path / "run", own, raw, server, *options, "--allow-path", authority.trusted)


def test_the_disk_itself_in_the_sandbox(tmp_path: Path, raw: Path) -> None:
    """By name, so that names are looked up within it when it is opened again."""
    need_landlock()
    key = pre_shared_key(tmp_path / "keys.psk", "vm1")
    run = tmp_path / "run"
    run.mkdir()
    with by_key(tmp_path, raw, key, key) as server:
        uri = server.uri.replace("127.0.0.1", "localhost")
        with Served(run, uri, "--sandbox", "require") as served:
            served.start_mirror(run / "c.img", create=True)
            served.qmp.execute("switch")
            served.start_mirror(uri, fenced=True)  # another connection, made in the sandbox
            with served.guest() as guest:
                write_block(guest, 1, 1)
                flush(guest)
            served.stop()
    assert same_content(run / "c.img", raw)
    assert os.environ
