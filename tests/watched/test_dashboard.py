# SPDX-License-Identifier: Apache-2.0
"""The dashboard of share/grafana and the alerts ask for what there is: every query of theirs is put to a real
Prometheus that scrapes a real exporter of real backends."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.daemon.rig import Served, await_true, image, write_block
from tests.guest.assets import AssetError, cache_folder, fetch_prometheus
from tests.watched.alerts import ROOT, alerts
from tests.watched.exporter import Exporter
from tests.watched.prometheus import Prometheus
from vhostsync import metrics, receive_metrics
from vhostsync.exporter import process as exporter
from vhostsync.limits import KINDS
from vhostsync.metrics_page import PREFIX

DASHBOARD = ROOT / "share/grafana/vhostsync.json"
NOTHING = "Empty as long as"
OF_PROMETHEUS = {"up", "ALERTS"}
WIDTH = 24
# A limit of every kind, for each has its figure; so wide that the guest never meets one.
WIDE = {"bps": "1G", "iops": "1000000"}
LIMITED = [
    word for kind in KINDS for word in (f"--limit-{kind.replace('_', '-')}", WIDE[kind.partition("_")[0]])
]


def dashboard() -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return shown


def panels() -> list[dict[str, Any]]:
    return [each for each in dashboard()["panels"] if each["type"] != "row"]


def queries() -> Iterator[tuple[str, str, str]]:
    """Each with its panel's title and description."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], panel["description"], target["expr"]


def all_expressions() -> list[str]:
    shown = dashboard()
    of_variables = [each["query"]["query"] for each in shown["templating"]["list"] if each["type"] == "query"]
    of_marks = [each["expr"] for each in shown["annotations"]["list"]]
    return [
        *(query for _, _, query in queries()),
        *of_variables,
        *of_marks,
        *(each.expression for each in alerts()),
    ]


def filled_in(query: str) -> str:
    """As Grafana asks where all hosts and disks are chosen."""
    return query.replace("$__rate_interval", "1m").replace("$instance", ".*").replace("$vm", ".*")


def names_in(expression: str) -> set[str]:
    without_strings = re.sub(r'"[^"]*"', '""', expression)
    in_patterns = re.findall(r'__name__=~"([^"]*)"', expression)
    named = set(re.findall(rf"\b(?:{PREFIX}\w+|up(?=\{{)|ALERTS)\b", without_strings))
    for pattern in in_patterns:
        before, _, rest = pattern.partition("(")
        named |= {before + each for each in rest.rstrip(")").split("|")}
    return named


def declared_names() -> set[str]:
    families = (*metrics.FAMILIES, *receive_metrics.FAMILIES, *exporter.FAMILIES)
    suffixes = {"histogram": ("_bucket", "_sum", "_count")}
    return {PREFIX + each.name + suffix for each in families for suffix in suffixes.get(each.kind, ("",))}


def test_every_name_is_a_declared_one() -> None:
    asked = {name for expression in all_expressions() for name in names_in(expression)}
    assert asked - OF_PROMETHEUS - declared_names() == set()
    assert len(asked) > 30


def test_nothing_is_declared_twice() -> None:
    families = [*metrics.FAMILIES, *receive_metrics.FAMILIES, *exporter.FAMILIES]
    names = [each.name for each in families]
    assert len(names) == len(set(names))


def test_panels_lie_side_by_side_and_say_what_they_show() -> None:
    taken: dict[tuple[int, int], str] = {}
    shown = dashboard()["panels"]
    assert len({each["id"] for each in shown}) == len(shown)
    for panel in shown:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= WIDTH
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    assert all(panel["description"] and panel["targets"] for panel in panels())


def test_every_alert_names_what_there_is_to_look_at() -> None:
    """A command, an option or a figure that an alert names exists."""
    known = "\n".join(
        path.read_text() for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("vhostsync/cli/*.py"))
    )
    for each in alerts():
        for word in re.findall(r"--[a-z][a-z-]+|`vhostsync ([a-z-]+)", each.description):
            assert word in known, (each.name, word)


class Watched:
    """Asked for the moment of the newest sample: on a busy machine a later scrape may take too long."""

    def __init__(self, prometheus: Prometheus) -> None:
        self.prometheus = prometheus
        last = prometheus.query('max(max_over_time(timestamp(vhostsync_lag_bytes{vm="vm1"})[1m:1s]))')
        self.at_s = last[0][1]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        return self.prometheus.query(filled_in(expression), self.at_s)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Two backends, one with a mirror and a guest that writes, once Prometheus has seen them do so."""
    try:
        fetch_prometheus(cache_folder())
    except AssetError as error:
        pytest.skip(f"NOT TESTED: Prometheus cannot be had here: {error}")
    work = tmp_path_factory.mktemp("watched")
    with (
        Served(work, image(work / "a.img"), "--bitmap", work / "bits", *LIMITED, name="vm1") as served,
        Served(work, image(work / "b.img"), "--no-state-file", name="vm2"),
        Exporter(work) as page,
        Prometheus(work, {"vhostsync": page.address or ""}) as prometheus,
        served.guest() as guest,
    ):
        served.start_mirror(work / "c.img", create=True)
        number = 0

        def seen_at_work() -> bool:
            nonlocal number
            number += 1
            write_block(guest, number % 64, number)
            found = prometheus.query('count_over_time(vhostsync_lag_bytes{vm="vm1"}[1m])')
            return bool(found) and found[0][1] >= 5

        await_true(seen_at_work, "Prometheus has scraped the backends at work", timeout_s=120)
        yield Watched(prometheus)


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("title", "description", "query"),
    [pytest.param(*each, id=f"{number}: {each[0]}") for number, each in enumerate(queries())],
)
def test_every_panel_shows_something(watched: Watched, title: str, description: str, query: str) -> None:
    found = watched.query(query)
    assert found or NOTHING in description, f"{title}: nothing for {query}"


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_what_is_shown_is_what_is(watched: Watched) -> None:
    by_title = {title: query for title, _, query in queries()}

    def one(title: str) -> float:
        ((_, value),) = watched.query(by_title[title])
        return value

    assert one("Disks that answer") == 2
    assert one("Backends down") == 0
    assert one("Steady") == 1
    assert one("Degraded") == one("Flushes paused") == 0
    mirrors = {labels["vm"]: value for labels, value in watched.query(by_title["Mirrors"])}
    assert mirrors == {"vm1": 2, "vm2": 0}
    assert watched.query(by_title["What has to be looked at"]) == []
    rates = watched.query(by_title["Throughput"])
    assert any(
        labels["vm"] == "vm1" and labels["operation"] == "write" and value > 0 for labels, value in rates
    )


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_every_declared_metric_of_a_backend_at_work_is_there(watched: Watched) -> None:
    """But for what is undefined in this state."""
    families = (*metrics.FAMILIES, *exporter.FAMILIES)
    there = watched.prometheus.names()
    missing = {
        each.name for each in families
        if PREFIX + each.name + ("_count" if each.kind == "histogram" else "") not in there
    }  # fmt: skip
    assert missing == set()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_each_limit_of_the_guest_has_its_figure(watched: Watched) -> None:
    for unit, wanted in (("bytes", 2**30), ("requests", 1e6)):
        found = watched.query(f"vhostsync_limit_{unit}_per_second")
        assert {(labels["vm"], labels["of"]): value for labels, value in found} == {
            ("vm1", of): wanted for of in metrics.LIMITED.values()
        }


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_rules_are_loaded_and_quiet(watched: Watched) -> None:
    assert watched.prometheus.firing() == set()
    assert watched.query("count(vhostsync_up)") != []
