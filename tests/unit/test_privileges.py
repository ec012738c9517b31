# SPDX-License-Identifier: Apache-2.0
"""The steps of privileges.py on a kernel that is made up."""

import errno
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from vhostsync.config import ServeConfig
from vhostsync.confine import landlock, privileges
from vhostsync.confine.privileges import Confinement, Network, Reach, network_of, places_of
from vhostsync.errors import ConfigError, MirrorError
from vhostsync.host.kernel import PR_CAPBSET_DROP, PR_CAPBSET_READ, PR_SET_NO_NEW_PRIVS, Kernel
from vhostsync.option_values import TcpAddress
from vhostsync.storage.identity import DiskIdentity


class FakeKernel(Kernel):
    """Notes what it is asked for. `abi` 0: no Landlock."""

    def __init__(self, abi: int = 0) -> None:
        self.abi = abi
        self.options: list[int] = []
        self.bounding = {0, 5, 40}
        self.steps: list[str] = []
        self.rules: list[tuple[int, bytes]] = []
        self.attributes = b""

    def threads(self) -> int:
        return 1

    def prctl(self, option: int, argument: int = 0) -> int:
        if option == PR_CAPBSET_READ:
            if argument > 40:
                raise OSError(errno.EINVAL, "no such capability")
            return int(argument in self.bounding)
        if option == PR_CAPBSET_DROP:
            self.bounding.remove(argument)
            return 0
        self.steps.append("no_new_privs" if option == PR_SET_NO_NEW_PRIVS else "prctl")
        return 0

    def drop_capabilities(self) -> None:
        assert not self.bounding, "without capabilities the bounding set cannot be emptied any more"
        self.steps.append("capabilities")

    def landlock_abi(self) -> int:
        if not self.abi:
            raise OSError(errno.ENOSYS, "no Landlock")
        return self.abi

    def landlock_create(self, attributes: bytes) -> int:
        self.attributes = attributes
        return os.open("/dev/null", os.O_RDONLY)

    def landlock_add_rule(self, ruleset: int, kind: int, attributes: bytes) -> None:
        self.rules.append((kind, attributes))

    def landlock_restrict(self, ruleset: int) -> None:
        assert "no_new_privs" in self.steps, "the kernel would refuse"
        self.steps.append("landlock")


def make(**given: object) -> ServeConfig:
    return ServeConfig(blk_file="/disks/a.img", socket_path=Path("/run/vm.sock"), **given)  # type: ignore[arg-type]


def test_without_landlock_auto_goes_on_and_require_does_not() -> None:
    auto = Confinement(make(allow_paths=(Path("/disks"),)), (), FakeKernel())
    auto.confine()
    assert "capabilities" in auto.held and not auto.reach.enforced
    assert any(part.startswith("landlock") for part in auto.lacking)
    with pytest.raises(ConfigError, match="landlock"):
        Confinement(make(sandbox="require"), (), FakeKernel()).confine()


def test_files_are_not_withheld_unasked() -> None:
    kernel = FakeKernel(6)
    unasked = Confinement(make(), (), kernel)
    unasked.confine()
    assert not unasked.reach.enforced and "landlock" not in kernel.steps
    assert unasked.lacking == [] and "no-new-privs" in unasked.held


def test_off_asks_the_kernel_for_nothing() -> None:
    kernel = FakeKernel(6)
    Confinement(make(sandbox="off"), (), kernel).confine()
    assert kernel.steps == [] and kernel.bounding


@pytest.mark.parametrize(("abi", "length"), [(1, 8), (3, 8), (4, 16), (5, 16), (6, 24)])
def test_landlock_withholds_what_the_kernel_knows_and_no_more(tmp_path: Path, abi: int, length: int) -> None:
    kernel = FakeKernel(abi)
    confinement = Confinement(make(sandbox="require"), (tmp_path,), kernel)
    confinement.confine()
    assert confinement.reach.enforced
    assert len(kernel.attributes) == length
    (handled,) = struct.unpack_from("=Q", kernel.attributes)
    assert bool(handled & landlock.TRUNCATE) == (abi >= 3)
    assert bool(handled & landlock.IOCTL_DEV) == (abi >= 5)
    granted = [struct.unpack("=Qi", rule)[0] for kind, rule in kernel.rules if kind == landlock.RULE_PATH]
    assert not any(rights & ~handled for rights in granted), "the kernel refuses what is not handled"
    assert sum(bool(rights & landlock.MAKE_SOCK) for rights in granted) == 1, "one place is written to"


class NoFilter:
    internet = False

    def __init__(self, *, internet: bool, programs: bool) -> None:
        assert not programs
        NoFilter.internet = internet

    def load(self) -> None:
        pass


def no_engine() -> None:
    pass


@pytest.mark.parametrize(
    ("user", "abi", "given", "warns"),
    [
        (0, 6, {}, True),
        (0, 0, {"allow_paths": (Path("/"),)}, True),
        (0, 6, {"sandbox": "off"}, True),
        (0, 6, {"allow_paths": (Path("/"),)}, False),
        (1000, 6, {}, False),
    ],
)
def test_root_that_may_open_all_files_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, user: int, abi: int, given: dict[str, object], warns: bool
) -> None:
    monkeypatch.setattr(privileges, "Filter", NoFilter)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    confinement = Confinement(make(**given), (), FakeKernel(abi))
    confinement.confine()
    with structlog.testing.capture_logs() as logs:
        confinement.seal(no_engine)
    told = [entry["event"] for entry in logs if entry["log_level"] == "warning"]
    assert bool(told) == warns and all("this process is root" in each for each in told)


@pytest.mark.parametrize(
    ("given", "network", "internet"),
    [
        ({}, Network(), True),  # a destination may lie anywhere
        ({"allow_paths": (Path("/"),)}, Network(), False),
        ({"sandbox": "require"}, Network(), False),
        ({"sandbox": "require"}, Network(frozenset({10809})), True),
        ({"sandbox": "require"}, Network(None), True),
        ({"sandbox": "require", "metrics": TcpAddress("127.0.0.1", 9100)}, Network(), True),
    ],
)
def test_internet_sockets_are_for_disks_over_the_network(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, object], network: Network, internet: bool
) -> None:
    monkeypatch.setattr(privileges, "Filter", NoFilter)
    confinement = Confinement(make(**given), (), FakeKernel(6), network=network)
    confinement.confine()
    confinement.seal(no_engine)
    assert NoFilter.internet == internet


def test_only_the_ports_of_disks_may_be_connected_to(tmp_path: Path) -> None:
    key = tmp_path / "keys" / "psk"
    names = ["nbd://127.0.0.1:10810/x", f"nbds://one@host/?tls-psk-file={key}", str(tmp_path / "a.img")]
    network = network_of(make(allow_ports=(7000,)), names)
    assert network == Network(frozenset({10809, 10810, 7000}), (key,))
    kernel = FakeKernel(6)
    confinement = Confinement(make(sandbox="require"), (tmp_path / "in",), kernel, network=network)
    confinement.confine()
    ports = [struct.unpack("=QQ", rule) for kind, rule in kernel.rules if kind == landlock.RULE_PORT]
    assert ports == [(landlock.CONNECT_TCP, port) for port in (7000, 10809, 10810)]
    for name in (*names[:2], "nbd://elsewhere:7000/", "nbd+unix:///?socket=/any"):
        confinement.reach.check(name)
    with pytest.raises(MirrorError, match="--allow-port 9"):
        confinement.reach.check("nbd://host:9/")
    with pytest.raises(MirrorError, match=r"--allow-path /other$"):
        confinement.reach.check("nbds://host/?tls-certificates=/other/tls")


def test_rings_that_take_everything_are_a_part_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileges, "Filter", NoFilter)

    def unrestricted() -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    auto = Confinement(make(), (), FakeKernel(6))
    auto.seal(unrestricted)
    assert auto.held == ["seccomp"] and auto.lacking == ["io-uring (Operation not permitted)"]
    with pytest.raises(ConfigError, match="io-uring"):
        Confinement(make(sandbox="require"), (), FakeKernel(6)).seal(unrestricted)


def test_a_missing_place_is_told(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        Confinement(make(allow_paths=(tmp_path, tmp_path / "typo")), (tmp_path,), FakeKernel(6)).confine()
    assert [entry["path"] for entry in logs if entry["log_level"] == "warning"] == [str(tmp_path / "typo")]


def test_the_reach(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    reach = Reach((inside,), enforced=True)
    reach.check(str(inside / "b.img"))
    for path in (outside / "b.img", inside / "link" / "b.img", inside / ".." / "out" / "b.img"):
        with pytest.raises(MirrorError, match=f"--allow-path {outside}"):
            reach.check(str(path))
    Reach((inside,)).check(str(outside / "b.img"))


def image_at(path: Path) -> DiskIdentity:
    return DiskIdentity(str(path), "file", 1, 2, 1 << 20)


def test_the_places(tmp_path: Path) -> None:
    config = make(bitmap=Path("/maps/a"), allow_paths=(tmp_path,), metrics=Path("/metrics/m.sock"))
    found = places_of(config, [image_at(Path("/disks/a.img"))], Path("/state"))
    assert set(map(str, found)) == {str(tmp_path), "/disks", "/run", "/maps", "/metrics", "/state"} or (
        Path("/run").is_symlink()
    )


def test_a_disk_that_cannot_be_looked_at_is_a_place_all_the_same(tmp_path: Path) -> None:
    """The destination of the last run may be lost in any way; the guest is served."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    file = tmp_path / "file"
    file.touch()
    kernel = FakeKernel(6)
    for lost in (loop, loop / "b.img", file / "b.img", tmp_path / ("b" * 300)):
        found = places_of(make(), [image_at(lost)], None)
        assert tmp_path in found or lost.parent in found
        Reach((tmp_path,), enforced=True).check(str(lost))
        kernel.steps.append("no_new_privs")
        landlock.restrict(kernel, 6, landlock.Grants((), found))


WITHHELD = """
import errno, os, sys
from pathlib import Path
from vhostsync.confine import landlock
from vhostsync.host.kernel import PR_SET_NO_NEW_PRIVS, Kernel
kernel, inside, outside = Kernel(), Path(sys.argv[1]), Path(sys.argv[2])
version = landlock.abi(kernel)
kept = os.open(outside / "open", os.O_RDWR)
kernel.prctl(PR_SET_NO_NEW_PRIVS, 1)
landlock.restrict(kernel, version, landlock.Grants((), (inside,)))
(inside / "new").write_bytes(b"x")
(inside / "new").rename(inside / "renamed")
(inside / "renamed").unlink()
os.pwrite(kept, b"y", 0)
for do in (lambda: (outside / "open").read_bytes(), lambda: (outside / "new").write_bytes(b"x"),
           lambda: (outside / "open").unlink(), lambda: os.truncate(outside / "open", 0)):
    try:
        do()
    except PermissionError:
        continue
    sys.exit("allowed outside")
"""


def test_landlock_on_the_real_kernel(tmp_path: Path) -> None:
    """What lies outside cannot be opened any more; what is open already can be used."""
    version = landlock.abi(Kernel())
    if version < 3:
        pytest.skip(f"THIS TEST IS LEFT OUT, as this kernel has version {version} of Landlock, not 3")
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "open").write_bytes(b"x")
    words = [sys.executable, "-c", WITHHELD, str(inside), str(outside)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    assert (outside / "open").read_bytes() == b"y"


READING = """
import os, sys
from pathlib import Path
from vhostsync.confine import landlock, privileges
from vhostsync.host.kernel import PR_SET_NO_NEW_PRIVS, Kernel
kernel = Kernel()
kernel.prctl(PR_SET_NO_NEW_PRIVS, 1)
landlock.restrict(kernel, landlock.abi(kernel), landlock.Grants(privileges._read_places(), ()))
import zoneinfo, sqlite3, encodings.idna
for may in ("/etc/passwd", "/etc/group", "/proc/self/mountinfo", "/proc/sys/kernel/random/boot_id"):
    Path(may).read_bytes()
os.listdir("/sys/dev/block")
for withheld in sys.argv[1:]:
    try:
        open(withheld).close()
    except PermissionError:
        continue
    sys.exit(f"{withheld} can be read")
"""


def test_landlock_withholds_the_secrets_of_etc(tmp_path: Path) -> None:
    """And the current directory, which `python -m` puts where modules are looked for."""
    if landlock.abi(Kernel()) == 0:
        pytest.skip("THIS TEST IS LEFT OUT, as this kernel has no Landlock")
    (tmp_path / "probe.py").write_text(READING)
    named = {f"/etc/{name}" for name in privileges.SYSTEM_FILES}
    others = [
        str(path)
        for path in Path("/etc").iterdir()
        if str(path) not in named and path.is_file() and path.resolve().parent == Path("/etc")
        and os.access(path, os.R_OK)
    ]  # fmt: skip
    assert others
    words = [sys.executable, "-m", "probe", *others, str(tmp_path / "probe.py")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr


CONNECTED = """
import socket, sys
from vhostsync.confine import landlock
from vhostsync.host.kernel import PR_SET_NO_NEW_PRIVS, Kernel
kernel, allowed, other = Kernel(), int(sys.argv[1]), int(sys.argv[2])
kernel.prctl(PR_SET_NO_NEW_PRIVS, 1)
landlock.restrict(kernel, landlock.abi(kernel), landlock.Grants((), (), tcp_peers=(allowed,)))
socket.socket().connect(("127.0.0.1", allowed))
try:
    socket.socket().connect(("127.0.0.1", other))
except PermissionError:
    sys.exit(0)
sys.exit("connected to another port")
"""


def test_other_ports_are_withheld_on_the_real_kernel() -> None:
    version = landlock.abi(Kernel())
    if version < 4:
        pytest.skip(f"THIS TEST IS LEFT OUT, as this kernel has version {version} of Landlock, not 4")
    with socket.create_server(("127.0.0.1", 0)) as allowed, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [str(each.getsockname()[1]) for each in (allowed, other)]
        words = [sys.executable, "-c", CONNECTED, *ports]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
