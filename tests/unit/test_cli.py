# SPDX-License-Identifier: Apache-2.0
"""The command line: what each command asks of the backend, and what it prints."""

import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sizes import GIB
from tests.unit.command_line import ROOT, Run, Served, run, served, start
from vhostsync.cli import main as cli
from vhostsync.cli import operate
from vhostsync.config import ServeConfig
from vhostsync.errors import DiskError, SwitchError
from vhostsync.limits import Limits, Rate
from vhostsync.option_values import Answer, TakeOver

__all__ = ["run", "served"]  # fixtures


# ---- client commands ----


def test_status_for_people(served: Served, run: Run) -> None:
    served.become(
        state="steady",
        worth="up-to-date",
        destination="/disks/b.img",
        lag_writes=3,
        lag_bytes=12288,
        lag_ms=4.2,
        copy_bytes_total=GIB,
        copy_bytes_done=GIB,
        copy_bytes_sparse=GIB // 2,
        speed_bytes_per_s=100 << 20,
        last_error="it hung",
        outdated_since="2026-01-01T00:00:00Z",
        doubt=({"offset": 4096, "length": 512},),
        unreadable=({"offset": 65536, "length": 4096},),
        paused=True,
        paused_requests=3,
        paused_s=12.2,
        record_error="the state record /r cannot be written: No space left on device",
        flushes_fail=True,
    )
    code, out, _ = run("status")
    assert code == 0
    assert "Disk         /disks/a.img, 1.0 GiB\n" in out
    assert "running, 1 frontend connected, one runs rings" in out
    assert "steady  /disks/b.img is up to date; lag 3 writes, 12.0 KiB, 4 ms" in out
    assert "7 writes completed, 5 durable" in out
    assert "- writes mirrored, - durable; the guest asked for 5" in out
    assert "100.0 %  1.0 GiB of 1.0 GiB, 512.0 MiB of it sparse" in out
    assert "100.0 MiB/s" in out
    assert "In doubt     512 bytes of the source from 4096 on" in out
    assert "Paused       for 12 s; 3 flushes wait for a mirror, or for mirror cancel" in out
    assert "Unreadable   4096 bytes of the source from 65536 on" in out
    assert "Record       the state record /r cannot be written: No space left on device; the guest's" in out
    assert "it hung" in out


def test_status_for_scripts(served: Served, run: Run) -> None:
    code, out, _ = run("status", "--json")
    result = json.loads(out)
    assert code == 0
    assert result["status"]["capacity"] == GIB
    assert result["mirror"]["state"] == "passthrough"


def test_stats(served: Served, run: Run) -> None:
    code, out, _ = run("stats")
    assert code == 0
    assert "Queue 0: running, 2 in flight, 0 malformed, 9 kicks, 8 notifications" in out
    assert "Queue 1: broken (a chain that loops)" in out
    assert "write          20  80.0 KiB       0       98   98  131    131" in out
    assert "Source /disks/a.img: 0 in flight" in out
    assert "log 4.0 KiB of 64.0 MiB" in out
    assert "Engine: 2 threads (lent 30 disk operations), 40 wake-ups" in out
    code, out, _ = run("stats", "--json")
    assert json.loads(out)["engine"]["wakeups"] == 40


def test_limit(served: Served, run: Run) -> None:
    code, out, _ = run("limit", "--bps-wr", "50M:200M:30s", "--iops", "2000", "--iops-size", "64K")
    shown, waited = out.splitlines()
    assert code == 0 and waited == "Waited       7 requests, 8.0 KiB; some ring for 1.5 s in all"
    assert shown.startswith("Limits       writes 50.0 MiB/s (200.0 MiB for 30 s), 2,000 requests/s, ")
    assert shown.endswith(", a request counts by 64.0 KiB")
    assert served.backend.limits == Limits(
        bps_wr=Rate(50 << 20, 200 << 20, 30), iops=Rate(2000), iops_size=64 << 10
    )
    assert "writes 50.0 MiB/s" in run("status")[1]
    code, out, _ = run("limit", "--none", "--json")
    assert code == 0 and json.loads(out)["limited-requests"] == 7
    assert served.backend.limits == Limits() and "Limits       none" in run("limit")[1]
    assert "Limits" not in run("status")[1]
    code, _, err = run("limit", "--none", "--iops", "3")
    assert code == 2 and "--none" in err
    served.backend.shows_limits = False
    code, out, err = run("limit")
    assert (code, out) == (1, "") and "no guest here to limit" in err
    code, _, err = run("limit", "--iops-rd", "3:2")
    assert code == 2 and "--iops-rd: a burst is no slower than its limit" in err


def test_resize(served: Served, run: Run) -> None:
    code, out, _ = run("resize")
    assert (code, out) == (0, "The guest's disk has 2.0 GiB now.\n")
    code, out, _ = run("resize", "--size", "3G", "--json")
    assert (code, json.loads(out)) == (0, {"capacity": 3 * GIB})
    code, _, err = run("resize", "--size", "1M")
    assert (code, err) == (1, "vhostsync: the guest's disk cannot shrink\n")


def test_verify(served: Served, run: Run) -> None:
    verifier = served.backend.verifier
    code, out, _ = run("verify", "--wait", "--repair", "--speed", "1M")
    assert code == 0
    assert verifier.calls == [f"verify True {1 << 20}"]
    assert out.splitlines()[-1] == "equal  100.0 %  1.0 GiB of 1.0 GiB"
    verifier.result = replace(verifier.result, state="different", bytes_differing=512)
    code, out, _ = run("verify", "--wait", "--json")
    assert code == 1
    assert json.loads(out)["bytes-differing"] == 512
    code, _, err = run("verify-cancel")
    assert (code, err) == (1, "vhostsync: no verification is under way\n")


def test_a_start_that_does_not_wait(
    served: Served, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("mirror", "start", "b.img", "--create", "--cache", "writeback", "--speed", "100M")
    assert code == 0
    assert "vhostsync watch" in out
    target = served.backend.mirror.target
    assert target is not None
    assert target.name == str(tmp_path / "b.img")  # the backend's directory is not this one
    assert (target.create, target.cache, target.speed_bytes_per_s) == (True, "writeback", 100 << 20)
    code, _, err = run("mirror", "start", "/c.img")
    assert (code, err) == (1, "vhostsync: There is a destination already; cancel the mirror first.\n")


def test_a_start_that_waits_tells_when_it_is_steady(served: Served, run: Run) -> None:
    code, out, _ = run("mirror", "start", "/b.img", "--wait", "--timeout", "30")
    assert code == 0
    first, *_, last = out.splitlines()
    assert first.startswith("syncing  25.0 %  256.0 MiB of 1.0 GiB  95.4 MiB/s  about 8 s left")
    assert last.startswith("/b.img is up to date after ")


def test_a_start_that_waits_for_scripts_prints_one_object(served: Served, run: Run) -> None:
    code, out, _ = run("mirror", "start", "/b.img", "--wait", "--json")
    assert code == 0
    assert json.loads(out)["state"] == "steady"


def test_a_start_that_waits_for_a_failed_mirror_fails(served: Served, run: Run) -> None:
    served.backend.mirror.fail_copy = "the destination is full"
    code, _, err = run("mirror", "start", "/b.img", "--wait")
    assert (code, err) == (1, "vhostsync: The mirror to /b.img failed: the destination is full.\n")


def test_a_start_that_waits_too_long_says_that_the_copy_goes_on(served: Served, run: Run) -> None:
    served.backend.mirror.copy_steps = 0
    code, _, err = run("mirror", "start", "/b.img", "--wait", "--timeout", "50ms")
    assert code == 4
    assert "the copy goes on" in err
    assert served.backend.mirror.now.state == "syncing"


def test_cancel_and_speed(served: Served, run: Run) -> None:
    served.become(state="syncing", destination="/b.img", copy_bytes_total=GIB)
    code, out, _ = run("mirror", "speed", "50M")
    assert (code, out) == (0, "The copy is limited to 50.0 MiB a second.\n")
    code, out, _ = run("mirror", "speed", "none", "--json")
    assert json.loads(out)["speed-bytes-per-s"] == 0
    code, out, _ = run("mirror", "cancel", "--force")
    assert (code, out) == (0, "The mirror is cancelled.\n")
    assert served.backend.mirror.calls[-1] == "cancel True"
    code, _, err = run("mirror", "cancel")
    assert (code, err) == (1, "vhostsync: There is no mirror to cancel.\n")


def test_a_switch(served: Served, run: Run) -> None:
    served.become(state="steady", destination="/b.img")
    code, out, _ = run("switch", "--keep-mirror", "--deadline", "3s", "--max-pause", "50ms")
    assert (code, out) == (0, "The guest runs on /b.img. It was paused for 1.2 ms.\n")
    assert served.backend.mirror.switch_arguments == {"deadline_s": 3.0, "max_pause_ms": 50, "keep": True}
    code, _, err = run("switch")
    assert code == 1
    assert "not steady" in err


def test_a_switch_for_scripts(served: Served, run: Run) -> None:
    served.become(state="steady", destination="/b.img")
    code, out, _ = run("switch", "--json")
    assert (code, json.loads(out)["pause-us"]) == (0, 1234)


def test_a_switch_that_its_deadline_ended(served: Served, run: Run) -> None:
    served.become(state="steady", destination="/b.img")
    served.backend.mirror.switch_error = SwitchError("The log did not drain in time; the guest stays.")
    code, _, err = run("switch", "--deadline", "1h")
    assert code == 1
    served.backend.mirror.switch_takes_its_time = True
    code, _, err = run("switch", "--deadline", "1ms")
    assert (code, err) == (4, "vhostsync: The log did not drain in time; the guest stays.\n")


def test_a_switch_that_is_never_answered(served: Served, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import anyio

    monkeypatch.setattr(operate, "REPLY_GRACE_S", 0.05)
    served.become(state="steady", destination="/b.img")
    served.backend.mirror.hold_switch = served.portal.call(anyio.Event)
    code, _, err = run("switch", "--deadline", "1ms")
    assert code == 4
    assert "may still be at it" in err


def test_quit_waits_for_the_end(served: Served, run: Run) -> None:
    code, _, _ = run("quit", "--force")
    assert code == 0
    assert served.backend.quit_force is True
    code, _, _ = run("status")
    assert code == 3


def test_quit_waits_for_the_process(tmp_path: Path) -> None:
    """The backend lets go of its control socket before it brings the mirror up to date."""
    path, done = tmp_path / "control", tmp_path / "done"
    script = """if True:
        import sys, anyio
        from pathlib import Path
        from tests.unit.control_fakes import FakeBackend, running

        async def serve():
            backend = FakeBackend()
            async with running(Path(sys.argv[1]), backend):
                print("ready", flush=True)
                await backend.quit_asked.wait()

        anyio.run(serve)
        print("closed", flush=True)
        sys.stdin.read()
        Path(sys.argv[2]).touch()
    """
    with subprocess.Popen(
        [sys.executable, "-c", script, path, done],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as backend:
        assert backend.stdin is not None and backend.stdout is not None
        while backend.stdout.readline() != "ready\n":
            pass
        with start("quit", "--json", "--control", str(path)) as program:
            while backend.stdout.readline() != "closed\n":
                pass
            assert program.poll() is None
            backend.stdin.close()
            out, err = program.communicate(timeout=30)
        assert (program.returncode, out, err) == (0, "{}\n", "")
        assert done.exists()
        backend.wait(timeout=30)


def test_quit_does_not_wait_for_ever(served: Served, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def not_now(*, force: bool) -> None:
        pass

    monkeypatch.setattr(served.backend, "quit", not_now)
    code, _, err = run("quit", "--timeout", "50ms")
    assert code == 4
    assert "not do that in time" in err


def test_the_control_socket_may_be_named_before_or_after_the_command(
    served: Served, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VHOSTSYNC_CONTROL")
    assert run("--control", str(served.path), "status")[0] == 0
    assert run("status", "--control", str(served.path))[0] == 0
    assert run("mirror", "cancel", f"--control={served.path}")[0] == 1
    code, _, err = run("status")
    assert code == 2
    assert "VHOSTSYNC_CONTROL" in err


@pytest.mark.parametrize(
    "words", [["status"], ["watch"], ["mirror", "start", "/b", "--wait"], ["switch"], ["quit"]]
)
def test_no_backend_is_told_apart(run: Run, tmp_path: Path, words: list[str]) -> None:
    code, out, err = run(*words, "--control", str(tmp_path / "nobody"))
    assert (code, out) == (3, "")
    assert err.count("\n") == 1
    assert "is the backend running" in err


# ---- serve ----


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
    """Plays the daemon; collects what it is called with. A disk named /missing cannot be served."""
    called: list[ServeConfig] = []

    def run_daemon(settings: ServeConfig, take_over: TakeOver) -> int:
        assert take_over is TakeOver.NOTHING
        called.append(settings)
        if settings.blk_file == "/missing":
            raise DiskError("There is no disk /missing; give the path of an image file or a block device.")
        return 0

    module = types.ModuleType("vhostsync.daemon")
    module.run = run_daemon  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vhostsync.daemon", module)
    return called


def test_serve_hands_over_every_option(run: Run, daemon: list[ServeConfig]) -> None:
    options = """--socket-path /run/s --blk-file /a.img --read-only --format raw --cache writeback
        --num-queues 8 --serial vm1 --block-size 4096 --write-cache off --destination-cache writeback
        --log-size 128M --name web1 --max-lag-ms 100 --on-congestion pull-ahead --congestion-fill 64M
        --destination-timeout 5s --stop-timeout 500ms --copy-depth 4
        --poll-us 25 --threads 2 --packed-rings off
        --limit-bps 100M:400M:10s --limit-bps-rd 50M --limit-bps-wr 40M/s --limit-iops 1000
        --limit-iops-rd 800:900 --limit-iops-wr 700 --limit-iops-size 64K
        --destination-retry 3s --resume-mirror off --read-fallback --on-source-error switch
        --on-destination-error pause --fence-command /bin/fence --fenced
        --connections 4 --allow-plaintext --reconnect-timeout 5s
        --ceph-conf /c.conf --ceph-user vm --ceph-keyring /c.keyring --break-lock
        --dirty-region-size 128K
        --bitmap /m.bits --al-extents 256 --al-extent-size 16M
        --state-file /s.json --control /run/c --metrics 127.0.0.1:9100
        --log-format json --log-level debug
        --user nobody:kvm --sandbox off --allow-path /one --allow-path /two --allow-port 10809"""
    words = ["serve", *options.split()]
    assert run(*words)[0] == 0
    [settings] = daemon
    assert settings.socket_path == Path("/run/s")
    assert settings.blk_file == "/a.img"
    assert settings.read_only and settings.disk_format == "raw"
    assert (settings.cache, settings.destination_cache) == ("writeback", "writeback")
    assert (settings.num_queues, settings.serial, settings.block_bytes) == (8, "vm1", 4096)
    assert not settings.write_cache and not settings.resume_mirror and not settings.packed_rings
    assert (settings.log_bytes, settings.max_lag_ms) == (128 << 20, 100)
    assert (settings.destination_timeout_s, settings.stop_timeout_s) == (5, 0.5)
    assert (settings.copy_depth, settings.dirty_region_bytes) == (4, 128 << 10)
    assert (settings.poll_us, settings.threads, settings.destination_retry_s) == (25, 2, 3)
    assert settings.limits == Limits(
        Rate(100 << 20, 400 << 20, 10), Rate(50 << 20), Rate(40 << 20), Rate(1000), Rate(800, 900), Rate(700),
        64 << 10,
    )  # fmt: skip
    assert (settings.on_congestion, settings.congestion_fill_bytes) == ("pull-ahead", 64 << 20)
    assert (settings.read_fallback, settings.on_source_error) == (True, "switch")
    assert settings.on_destination_error == "pause"
    assert (settings.fence_words, settings.fenced) == (("/bin/fence",), True)
    assert settings.connections == 4 and settings.allow_plaintext and settings.reconnect_timeout_s == 5
    assert (settings.ceph_conf, settings.ceph_keyring) == (Path("/c.conf"), Path("/c.keyring"))
    assert (settings.ceph_user, settings.break_lock) == ("vm", True)
    assert settings.network_use.break_lock_of == "/a.img"
    assert (settings.bitmap, settings.al_extents) == (Path("/m.bits"), 256)
    assert settings.al_extent_bytes == 16 << 20
    assert (settings.state_file, settings.control_path) == (Path("/s.json"), Path("/run/c"))
    assert str(settings.metrics) == "127.0.0.1:9100"
    assert (settings.log_format, settings.log_level) == ("json", "debug")
    assert (settings.user, settings.sandbox) == ("nobody:kvm", "off")
    assert settings.allow_paths == (Path("/one"), Path("/two"))
    assert settings.allow_ports == (10809,)
    changed = {
        name
        for name, field in ServeConfig.__dataclass_fields__.items()
        if getattr(settings, name) != field.default
    }
    assert set(ServeConfig.__dataclass_fields__) - changed == {
        "fd", "no_state_file", "answer", "fence", "record_of_name",
        "group", "group_freeze",
    }  # fmt: skip


@pytest.mark.parametrize("answer", Answer)
def test_an_answer_is_one_and_can_be_recorded(
    daemon: list[ServeConfig], run: Run, answer: Answer
) -> None:
    words = ["serve", "--socket-path=/run/s", "--blk-file=/a.img", f"--{answer}"]
    assert run(*words)[0] == 0 and daemon[0].answer is answer
    others = {f"--{each}" for each in Answer} - {words[-1]}
    for more in (*others, "--no-state-file", "--read-only"):
        assert run(*words, more)[0] == 2


@pytest.mark.parametrize(
    "words",
    [
        ["--socket-path=/run/s", "--blk-file=/a.img"],
        ["--blk-file=/a.img", "--socket-path", "/run/s"],
        ["serve", "--socket-path=/run/s", "--blk-file=/a.img"],
    ],
)
def test_the_word_serve_may_be_left_out(run: Run, daemon: list[ServeConfig], words: list[str]) -> None:
    assert run(*words)[0] == 0
    assert daemon == [ServeConfig(blk_file="/a.img", socket_path=Path("/run/s"))]


def test_without_the_extension_it_says_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vhostsync.daemon", None)
    code, _, err = run("--socket-path=/run/s", "--blk-file=/a.img")
    assert code == 1
    assert "pip install" in err


def test_an_inherited_descriptor(run: Run, daemon: list[ServeConfig]) -> None:
    assert run("--fd=3", "--blk-file=/a.img", "--read-only", "--no-state-file")[0] == 0
    assert (daemon[0].fd, daemon[0].read_only, daemon[0].no_state_file) == (3, True, True)


@pytest.mark.parametrize(
    "words",
    [
        ["--print-capabilities"],
        ["serve", "--print-capabilities"],
        ["--fd", "x", "--wrong", "--print-capabilities"],
    ],
)
def test_capabilities_are_printed_and_the_rest_ignored(
    run: Run, daemon: list[ServeConfig], words: list[str]
) -> None:
    code, out, err = run(*words)
    assert (code, err, daemon) == (0, "", [])
    assert json.loads(out) == {"type": "block", "features": ["read-only", "blk-file"]}


def test_a_start_that_fails_says_why_on_stderr(run: Run, daemon: list[ServeConfig]) -> None:
    code, out, err = run("--socket-path=/run/s", "--blk-file=/missing")
    assert (code, out) == (1, "")
    assert err.startswith("vhostsync: There is no disk /missing")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "COMMAND"),
        (["dance"], "invalid choice"),
        (["serve"], "--blk-file"),
        (["--blk-file=/a"], "exactly one of --socket-path and --fd"),
        (["--blk-file=/a", "--socket-path=/s", "--fd=3"], "exactly one of --socket-path and --fd"),
        (["--blk-file=/a", "--socket-path=/s", "--num-queues=65"], "--num-queues 65 is out of range"),
        (["--blk-file=/a", "--socket-path=/s", "--log-size=64XB"], "is not a size"),
        (["--blk-file=/a", "--socket-path=/s", "--metrics=host.example:1"], "is not an IP address"),
        (["--blk=/a", "--socket-path=/s"], "unrecognized arguments: --blk=/a"),
        (["mirror"], "ACTION"),
        (["mirror", "start"], "DESTINATION"),
        (["mirror", "start", "/b\udcff"], "not UTF-8"),
        (["mirror", "speed", "fast"], "is not a size"),
        (["switch", "--deadline", "0"], "longer than nothing"),
        (["--blk-file=", "--socket-path=/s"], "--blk-file is empty"),
        (["--blk-file=/a", "--socket-path=/s", "--max-lag-ms=soon"], "ms: 'soon' is no whole number"),
        (["mirror", "start", ""], "DESTINATION: it is empty"),
    ],
)
def test_wrong_usage(run: Run, daemon: list[ServeConfig], words: list[str], reason: str) -> None:
    code, out, err = run(*words)
    assert (code, out, daemon) == (2, "", [])
    assert reason in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["serve"], ["status"], ["watch"], ["mirror"], ["mirror", "start"], ["switch"], ["stats"], ["quit"], []],
)
def test_help_is_there_for_each(run: Run, words: list[str]) -> None:
    code, out, err = run(*words, "--help")
    assert (code, err) == (0, "")
    assert "usage: vhostsync" in out
    if words in ([], ["serve"], ["mirror", "start"], ["switch"], ["watch"]):
        assert "example" in out or "how it goes" in out


def test_the_descriptor_names_this_backend() -> None:
    descriptor = json.loads((ROOT / "share/qemu/vhost-user/50-vhostsync.json").read_text())
    assert descriptor["type"] == cli.CAPABILITIES["type"]
    assert set(descriptor) == {"description", "type", "binary"}  # the schema vhost-user.json
    assert Path(descriptor["binary"]).name == "vhostsync"
