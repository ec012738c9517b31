# SPDX-License-Identifier: Apache-2.0
"""Each alert fires when it should, says what it should, and is quiet before; by `promtool test rules`."""

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.guest.assets import AssetError, cache_folder, fetch_prometheus
from tests.watched.alerts import RULES, Alert, alerts

VM = 'instance="a:9748", vm="vm1"'


@dataclass(frozen=True)
class Case:
    """The samples are a minute apart. At `quiet` the alert does not fire, at `fires` it does, once."""

    alert: str
    series: dict[str, str]
    quiet: str
    fires: str
    summary: str
    value: str = ""  # of $value, as the texts show it
    more_labels: dict[str, str] = field(default_factory=dict)


def state(name: str, when: str) -> dict[str, str]:
    others = [each for each in ("passthrough", "syncing", "steady", "ahead", "degraded") if each != name]
    series = {f'vhostsync_mirror_state{{{VM}, state="{each}"}}': "0x60" for each in others}
    return {**series, f'vhostsync_mirror_state{{{VM}, state="{name}"}}': when}


def gauge(name: str, more: str = "") -> dict[str, str]:
    """0 at first, and 1 from the second minute on; and the same of a disk that is well."""
    return {
        f"vhostsync_{name}{{{VM}{more}}}": "0 0 1x30",
        f'vhostsync_{name}{{instance="a:9748", vm="well"{more}}}': "0x30",
    }


def counter(name: str, more: str = "") -> dict[str, str]:
    return {
        f"vhostsync_{name}{{{VM}{more}}}": "5 5 7x30",
        f'vhostsync_{name}{{instance="a:9748", vm="well"{more}}}': "5x30",
    }


CASES = (
    Case("VhostsyncExporterDown",
         {'up{job="vhostsync", instance="a:9748"}': "1 1 0x10", 'up{job="node", instance="a:9100"}': "0x12"},
         "3m50s", "5m", "Nothing is known of the disks of a:9748.", more_labels={"job": "vhostsync"}),
    Case("VhostsyncBackendDown", {f"vhostsync_up{{{VM}}}": "1 0x12"}, "1m50s", "3m",
         "The backend of vm1 does not answer."),
    Case("VhostsyncFlushesPaused", gauge("paused"), "2m", "2m20s",
         "The guest of vm1 stands still; its flushes wait for a second disk."),
    Case("VhostsyncFlushesFail", gauge("flushes_fail"), "1m", "2m",
         "The flushes of vm1 fail, because its state record cannot be written."),
    Case("VhostsyncSourceErrors", counter("disk_errors_total", ', disk="source", operation="write"'),
         "1m", "11m", "The disk of vm1 answers with errors (2 in 10 minutes)."),
    Case("VhostsyncSourceFailover", counter("source_failovers_total"), "1m", "20m",
         "The guest of vm1 has left its failed disk."),
    Case("VhostsyncSourceInDoubt", gauge("doubt_ranges"), "1m", "2m",
         "The disk of vm1 has 1 ranges that could not be written or read."),
    Case("VhostsyncSourceInDoubt", gauge("unreadable_ranges"), "1m", "2m",
         "The disk of vm1 has 1 ranges that could not be written or read."),
    Case("VhostsyncQueueBroken", gauge("queue_broken", ', queue="3"'), "1m", "2m",
         "Queue 3 of vm1 was given up because of what the guest has put there.", more_labels={"queue": "3"}),
    Case("VhostsyncDegraded", state("degraded", "0 0 1x30"), "2m50s", "3m10s",
         "vm1 has lost its second disk.",
         more_labels={"state": "degraded"}),
    Case("VhostsyncLagGrowing",
         {f"vhostsync_lag_seconds{{{VM}}}": "0+1x60", f"vhostsync_lag_bytes{{{VM}}}": "0+1000x60",
          'vhostsync_lag_seconds{instance="a:9748", vm="catching up"}': "60-1x60",
          'vhostsync_lag_bytes{instance="a:9748", vm="catching up"}': "60000-1000x60"},
         "7m", "10m", "The destination of vm1 is 10s behind, and falls further behind."),
    Case("VhostsyncDestinationSlow", {f"vhostsync_throttled_seconds_total{{{VM}}}": "0+30x30"}, "4m", "10m",
         "The destination slows the guest of vm1 down.", value="50%"),
    Case("VhostsyncAheadForLong", state("ahead", "0 1x40"), "15m50s", "17m",
         "vm1 has run ahead of its destination for 15 minutes.", more_labels={"state": "ahead"}),
    Case("VhostsyncCopyStandsStill",
         {**state("syncing", "1x60"), f"vhostsync_copy_done_bytes{{{VM}}}": "0+1000x10 10000x40",
          'vhostsync_mirror_state{instance="a:9748", vm="getting on", state="syncing"}': "1x60",
          'vhostsync_copy_done_bytes{instance="a:9748", vm="getting on"}': "0+1000x60"},
         "19m", "30m", "The copy of vm1 does not get on.", more_labels={"state": "syncing"}),
    Case("VhostsyncDestinationErrors",
         counter("disk_errors_total", ', disk="destination", operation="write"'), "1m", "11m",
         "The destination of vm1 answers with errors (2 in 10 minutes)."),
    Case("VhostsyncReadsFromDestination", counter("reads_from_destination_total"), "1m", "20m",
         "The destination of vm1 answers reads that its disk fails."),
    Case("VhostsyncFenceAwaited", gauge("fence_awaited"), "6m50s", "7m10s",
         "The mirror of vm1 waits until it is certain that a lost connection's requests are over."),
    Case("VhostsyncDifferent", gauge("different"), "1m", "2m",
         "A verification has found that the two disks of vm1 differ."),
    Case("VhostsyncRecordUnwritable", gauge("record_unwritable"), "2m50s", "3m10s",
         "The state record of vm1 cannot be written."),
    Case("VhostsyncBitmapFailed", gauge("bitmap_failed"), "1m", "2m",
         "The dirty bitmap of vm1 cannot be used."),
    Case("VhostsyncDiskReplaced", gauge("disk_replaced", ', disk="source"'), "2m50s", "3m10s",
         "Another file has the name of the source disk of vm1, or none has.", more_labels={"disk": "source"}),
    Case("VhostsyncFrontendWaits", gauge("frontends_waiting"), "3m50s", "4m10s",
         "A second machine waits for the disk of vm1."),
    Case("VhostsyncReceiverRefuses", gauge("receive_refusing"), "6m50s", "7m10s",
         "The receiver of vm1 does not let its owner have the disk."),
)  # fmt: skip


@pytest.fixture(scope="module")
def promtool() -> Path:
    try:
        return fetch_prometheus(cache_folder(), "promtool")
    except AssetError as error:
        pytest.skip(f"NOT TESTED: promtool cannot be had here: {error}")


def test_promtool_finds_no_fault(promtool: Path) -> None:
    checked = subprocess.run([promtool, "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert f"{len(alerts())} rules found" in checked.stdout


def test_every_alert_has_a_case() -> None:
    assert {each.name for each in alerts()} == {each.alert for each in CASES}


def unit_test(case: Case, declared: Alert) -> dict[str, object]:
    vm = {} if case.alert == "VhostsyncExporterDown" else {"vm": "vm1"}
    labels = {"severity": declared.severity, "instance": "a:9748", **vm, **case.more_labels}
    description = declared.description
    for name, value in labels.items():
        description = description.replace(f"{{{{ $labels.{name} }}}}", value)
    for shown in ("{{ $value | humanizePercentage }}", "{{ $value }}"):
        description = description.replace(shown, case.value)
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [
            {"alertname": case.alert, "eval_time": case.quiet},
            {
                "alertname": case.alert,
                "eval_time": case.fires,
                "exp_alerts": [
                    {
                        "exp_labels": labels,
                        "exp_annotations": {"summary": case.summary, "description": description},
                    }
                ],
            },
        ],
    }


def run_unit_tests(promtool: Path, tmp_path: Path, tests: list[dict[str, object]]) -> tuple[int, str]:
    """JSON is YAML, too."""
    document = {"rule_files": [str(RULES)], "evaluation_interval": "10s", "tests": tests}
    path = tmp_path / "alerts.test.yml"
    path.write_text(json.dumps(document))
    done = subprocess.run([promtool, "test", "rules", path], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_it_fires_when_it_should(promtool: Path, tmp_path: Path, case: Case) -> None:
    declared = {each.name: each for each in alerts()}[case.alert]
    code, said = run_unit_tests(promtool, tmp_path, [unit_test(case, declared)])
    assert code == 0, said


def test_nothing_fires_where_all_is_well(promtool: Path, tmp_path: Path) -> None:
    well = {
        'up{job="vhostsync", instance="a:9748"}': "1x60",
        f"vhostsync_up{{{VM}}}": "1x60",
        **state("steady", "1x60"),
        f"vhostsync_lag_seconds{{{VM}}}": "0 1 0 2 0x57",
        f"vhostsync_lag_bytes{{{VM}}}": "0 4096 0 8192 0x57",
        f"vhostsync_throttled_seconds_total{{{VM}}}": "0x10 0.5x50",
        f'vhostsync_disk_errors_total{{{VM}, disk="source", operation="read"}}': "0x60",
        f"vhostsync_copy_done_bytes{{{VM}}}": "1000x60",
        f"vhostsync_doubt_ranges{{{VM}}}": "0x60",
        f"vhostsync_frontends_waiting{{{VM}}}": "0x60",
    }
    test: dict[str, object] = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in well.items()],
        "alert_rule_test": [
            {"alertname": each.name, "eval_time": f"{minute}m"} for each in alerts() for minute in (5, 30, 59)
        ],
    }
    code, said = run_unit_tests(promtool, tmp_path, [test])
    assert code == 0, said
