# SPDX-License-Identifier: Apache-2.0
"""The options of `serve` that limit its guest; `vhostsync limit` has them, too."""

from dataclasses import dataclass
from typing import Final

from .limits import NO_LIMIT, RATE_MAX, Limits, Rate
from .option import BYTES_RATE, REQUESTS_RATE, SIZE, option

LIMITS: Final = "limits of the guest"


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """Part of ServeConfig."""

    limit_bps: Rate = option(
        "--limit-bps", LIMITS, BYTES_RATE,
        "bytes a second that the guest may read and write; 100M:400M:10s lets it have 400M for 10 s",
        NO_LIMIT,
        detail="See operations.md, \"Limits of the guest\". `vhostsync limit` changes this and the following "
        "while the guest runs.",
    )
    limit_bps_rd: Rate = option("--limit-bps-rd", LIMITS, BYTES_RATE, "the same of reads", NO_LIMIT)
    limit_bps_wr: Rate = option(
        "--limit-bps-wr", LIMITS, BYTES_RATE, "the same of writes, discards and zeroes", NO_LIMIT
    )
    limit_iops: Rate = option(
        "--limit-iops", LIMITS, REQUESTS_RATE,
        "requests a second, but for flushes; 500:2000:10s lets it have 2000 for 10 s", NO_LIMIT,
    )
    limit_iops_rd: Rate = option("--limit-iops-rd", LIMITS, REQUESTS_RATE, "the same of reads", NO_LIMIT)
    limit_iops_wr: Rate = option(
        "--limit-iops-wr", LIMITS, REQUESTS_RATE, "the same of writes, discards and zeroes", NO_LIMIT
    )
    limit_iops_size: int = option(
        "--limit-iops-size", LIMITS, SIZE, "a larger request counts as so many of this size", 0,
        least=0, most=RATE_MAX, default_text="each counts as one",
    )

    @property
    def limits(self) -> Limits:
        """Of the guest, at the start."""
        return Limits(
            self.limit_bps, self.limit_bps_rd, self.limit_bps_wr, self.limit_iops, self.limit_iops_rd,
            self.limit_iops_wr, self.limit_iops_size,
        )  # fmt: skip
