# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus that scrapes what a test runs, and what its queries return."""

from __future__ import annotations

import http
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tests.daemon.rig import await_true
from tests.guest.assets import cache_folder, fetch_prometheus
from tests.guest.processes import Process
from tests.watched.alerts import RULES

SCRAPE_S = 2


class Prometheus:
    """Scrapes `targets` (HOST:PORT, by job) every SCRAPE_S."""

    def __init__(self, folder: Path, targets: Mapping[str, str]) -> None:
        settings = {
            "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": [target]}]}
                for job, target in targets.items()
            ],
        }
        (folder / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML, too
        self._process = Process(
            "prometheus",
            [
                fetch_prometheus(cache_folder()), f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}", "--web.listen-address=127.0.0.1:0",
            ],
            folder / "prometheus.log",
        )  # fmt: skip
        self._listening = re.compile(r'msg="Listening on" address=(\S+)')
        try:
            await_true(self._is_ready, "Prometheus answers queries")
        except BaseException:
            self._process.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()

    def _address(self) -> str | None:
        found = self._listening.search(self._process.log.read_text())
        return found[1] if found is not None else None

    def _is_ready(self) -> bool:
        """It refuses queries between listening and having read its log ("Service Unavailable")."""
        assert self._process.running, self._process.last_output()
        address = self._address()
        if address is None:
            return False
        try:
            urllib.request.urlopen(f"http://{address}/-/ready", timeout=30).close()
        except urllib.error.HTTPError as error:
            assert error.code == http.HTTPStatus.SERVICE_UNAVAILABLE, error
            return False
        return True

    def _ask(self, path: str, **parameters: str | float) -> Any:
        url = f"http://{self._address()}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                shown = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error
        assert shown["status"] == "success", shown
        return shown["data"]

    def query(self, expression: str, at_s: float | None = None) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of each series, now or at another time."""
        time = {} if at_s is None else {"time": at_s}
        found = self._ask("query", query=expression, **time)["result"]
        return [(each["metric"], float(each["value"][1])) for each in found]

    def query_range(self, expression: str, start_s: float, end_s: float, step_s: float) -> Any:
        return self._ask("query_range", query=expression, start=start_s, end=end_s, step=step_s)["result"]

    def names(self) -> set[str]:
        """Of all metrics that it has seen."""
        return set(self._ask("label/__name__/values"))

    def firing(self) -> set[str]:
        alerts = self._ask("alerts")["alerts"]
        return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}
