# SPDX-License-Identifier: Apache-2.0
"""The arguments of `exporter`, from what exporter_config.py declares."""

import argparse
from typing import Final

from vhostsync.cli.argument_types import Parser
from vhostsync.cli.option_arguments import add_options, given_options
from vhostsync.exporter.exporter_config import ExporterConfig

_EXPORTER: Final = """\
Serve the metrics of all backends of this host on one page, for Prometheus. The backends are asked by their
control sockets at each scrape, all at once; one that hangs or has ended is shown as down.
"""

_EXPORTER_EXAMPLES: Final = """\
examples:
  vhostsync exporter                                    # http://127.0.0.1:9748/metrics
  vhostsync exporter --listen 0.0.0.0:9748              # for a Prometheus on another host
  vhostsync exporter --sockets /run/vms --once          # print the page
  curl -s 127.0.0.1:9748/metrics | grep '^vhostsync_up'

It must be the user that the backends run as or, where each has a user of its own, root: share/systemd has
a unit that leaves root nothing but that. What the metrics mean is in docs/metrics.md; share/prometheus has
rules for alerts, share/grafana a dashboard.
It stays in the foreground; SIGTERM ends it. It exits 0 when told to end, 1 when it cannot serve (the reason
is on stderr), 2 when an option is wrong.
"""


def add_exporter(commands: "argparse._SubParsersAction[Parser]") -> None:
    exporter = commands.add_parser(
        "exporter", help="serve the metrics of all backends of this host", description=_EXPORTER,
        epilog=_EXPORTER_EXAMPLES,
    )  # fmt: skip
    add_options(exporter, ExporterConfig)


def exporter_config(arguments: argparse.Namespace) -> ExporterConfig:
    """The configuration. ConfigError."""
    return ExporterConfig(**given_options(arguments, ExporterConfig))
