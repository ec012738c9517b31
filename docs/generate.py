# SPDX-License-Identifier: Apache-2.0
"""Writes the documents that are made from the code: `python docs/generate.py`; --check only compares."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from bench.results import readme_table  # noqa: E402
from docs.structure import c_arrows, picture, python_arrows  # noqa: E402
from vhostsync import metrics, receive_metrics  # noqa: E402
from vhostsync.cli.serve_arguments import ANSWERS  # noqa: E402
from vhostsync.config import ServeConfig  # noqa: E402
from vhostsync.engine.snapshot import EngineFigures, QueueFigures  # noqa: E402
from vhostsync.events import EVENTS  # noqa: E402
from vhostsync.exporter import process as exporter  # noqa: E402
from vhostsync.exporter.exporter_config import ExporterConfig  # noqa: E402
from vhostsync.metrics_page import PREFIX, Family  # noqa: E402
from vhostsync.mirror.mirror_status import MirrorStatus  # noqa: E402
from vhostsync.node.node_config import NodeConfig  # noqa: E402
from vhostsync.option import FLAG, Option, options_of  # noqa: E402
from vhostsync.receive.receive_config import ReceiveConfig  # noqa: E402
from vhostsync.statistic import statistics_of  # noqa: E402

OPTIONS_HEAD = """\
# The options of `serve`

Made by docs/generate.py from the declarations in vhostsync/config.py. Sizes are bytes, or have a unit: 64M,
1GiB. Times are seconds, or have a unit: 500ms, 10s. Those of `receive`, `exporter` and `node` stand at the
end.
"""

RECEIVE_HEAD = """\
# The options of `receive`

From vhostsync/receive/receive_config.py.
"""

EXPORTER_HEAD = """\
# The options of `exporter`

From vhostsync/exporter/exporter_config.py.
"""

NODE_HEAD = """\
# The options of `node`

From vhostsync/node/node_config.py.
"""


def options_page() -> str:
    return "\n".join(
        [
            OPTIONS_HEAD, *_groups(ServeConfig), RECEIVE_HEAD, *_groups(ReceiveConfig),
            EXPORTER_HEAD, *_groups(ExporterConfig),
            NODE_HEAD, *_groups(NodeConfig),
        ]
    )  # fmt: skip


def _groups(config: type) -> list[str]:
    parts = []
    declared = [(option, option.default_word(each.default)) for each, option in options_of(config)]
    for group, options in groupby(declared, lambda pair: pair[0].group):
        rows = [_row(option, default) for option, default in options]
        if group.startswith("the state record"):
            rows += [f"| `--{answer}` |  | for one start, the answer to a start that was refused: {meaning} |"
                     for answer, meaning in ANSWERS.items()]  # fmt: skip
        head = f"## {group[0].upper()}{group[1:]}\n\n| option | default | meaning |\n| --- | --- | --- |\n"
        parts.append(head + "\n".join(rows) + "\n")
    return parts


def _row(option: Option, default: str) -> str:
    word = f" {option.kind.metavar}" if option.kind is not FLAG else ""
    flag = f"`{option.flag}{word}`".replace("|", "\\|")
    detail = f". {option.detail}" if option.detail else ""
    return f"| {flag} | {default} | {option.help}{_bounds(option)}{detail} |"


def _bounds(option: Option) -> str:
    if option.least is None or option.most is None:
        return ""
    return f" ({option.kind.text(option.least)} to {option.kind.text(option.most)})"


def statistics_table(shown: type) -> str:
    rows = [
        f"| `{each.name.replace('_', '-')}` | {declared.meaning} |" for each, declared in statistics_of(shown)
    ]
    return "| member | meaning |\n| --- | --- |\n" + "\n".join(rows) + "\n"


def events_table() -> str:
    rows = [f"| `{name}` | {event.when} | {event.data} |" for name, event in EVENTS.items()]
    return "| event | when | data |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"


def metrics_table(families: Iterable[Family]) -> str:
    rows = [
        f"| `{PREFIX}{each.name}` | {each.kind} | {', '.join(f'`{label}`' for label in each.labels)} "
        f"| {each.help} |"
        for each in families
    ]
    return "| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"


PARTS: dict[str, Callable[[], str]] = {
    "query-mirror": lambda: statistics_table(MirrorStatus),
    "queues": lambda: statistics_table(QueueFigures),
    "engine": lambda: statistics_table(EngineFigures),
    "events": events_table,
    "speed": readme_table,
    "metrics of a disk": lambda: metrics_table(metrics.FAMILIES),
    "metrics of a receiver": lambda: metrics_table(receive_metrics.FAMILIES),
    "metrics of the exporter": lambda: metrics_table(exporter.FAMILIES),
    "c floors": lambda: picture(c_arrows()),
    "python layers": lambda: picture(python_arrows()),
}


def filled(document: str) -> str:
    """Parts of it lie between marks, and are made anew; the rest is written by hand."""
    text = (DOCS / document).read_text()
    for name in re.findall(r"<!-- docs/generate\.py: (.*?) -->", text):
        place = re.search(rf"(<!-- docs/generate\.py: {name} -->\n\n).*?(\n?<!-- end -->)", text, re.DOTALL)
        assert place is not None, f"{document}: the mark of {name} has no end"
        text = text[: place.end(1)] + PARTS[name]() + "\n" + text[place.start(2) :].lstrip("\n")
    return text


DOCUMENTS: dict[str, Callable[[], str]] = {
    "options.md": options_page,
    "control-protocol.md": lambda: filled("control-protocol.md"),
    "architecture.md": lambda: filled("architecture.md"),
    "metrics.md": lambda: filled("metrics.md"),
    "../README.md": lambda: filled("../README.md"),
}


def main() -> None:
    """With --check nothing is written, and the exit code is 1 if something would change."""
    for name, page in DOCUMENTS.items():
        path, text = DOCS / name, page()
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"docs/{name} is not what the code says; run python docs/generate.py")


if __name__ == "__main__":
    main()
