# SPDX-License-Identifier: Apache-2.0
"""The metrics of a receiver, made of what its query-status returns. Pure."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from .metrics_page import Family, Page

Shown = Mapping[str, Any]


def _value_of(key: str) -> Callable[[Shown], Any]:
    return lambda shown: shown.get(key)


OF_RECEIVER: Final = (
    (Family("receive_capacity_bytes", "gauge", "Size of the disk."), _value_of("capacity")),
    (Family("receive_allocated_bytes", "gauge", "What the file system keeps of the image file."),
     _value_of("allocated")),
    (Family("receive_owned", "gauge", "1 once the disk has an owner."), _value_of("owned")),
    (Family("receive_attached", "gauge", "1 while a generation's server runs."), _value_of("attached")),
    (Family("receive_refusing", "gauge", "1 while the owner may not have the disk (why-not says why)."),
     lambda shown: shown.get("why-not") is not None),
    (Family("receive_generation", "gauge", "Number of the disk's generation."), _value_of("generation")),
    (Family("receive_written_bytes", "gauge", "Bytes that this generation has written."),
     _value_of("bytes-written")),
    (Family("receive_refused_total", "counter", "Requests of owners that were refused."),
     _value_of("refused")),
    (Family("receive_lost_servers_total", "counter", "Servers that ended by themselves, with an error."),
     _value_of("lost-servers")),
    (Family("receive_log_lines_dropped_total", "counter",
            "Lines of the log that stderr did not take in time."),
     _value_of("log-lines-dropped")),
)  # fmt: skip
FAMILIES: Final = tuple(family for family, _ in OF_RECEIVER)


def receiver_page(status: Shown, name: str | None = None) -> Page:
    """`name`: the label `vm`."""
    page = Page({"vm": name} if name else None)
    for family, value in OF_RECEIVER:
        page.one(family, value(status))
    return page
