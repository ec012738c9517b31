# SPDX-License-Identifier: Apache-2.0
"""What the state machine draws from: the guest's disk, where the guest works on it, and what it does."""

import errno

from hypothesis import strategies as st

from tests.engine_driver import DiskOp
from tests.sizes import MIB

BLOCK = 512
CAPACITY = 2 * MIB + 65536 + BLOCK
BLOCKS = CAPACITY // BLOCK
GROWS_BY = 56
"""Blocks, in all; at first the guest sees a disk without them, which ends amid a region."""
# Where the guest writes: the ends of the disk, and both sides of where one region copy ends and the next one
# begins.
AT_THE_END = (BLOCKS - GROWS_BY - 16, BLOCKS)
WINDOWS = [(0, 24), (2040, 2056), (4088, 4104), AT_THE_END]
QUEUES = 3

Chore = tuple[str, tuple[int, int], int, int, int]
"""What, in which window, from which block of it, how many blocks, on which queue."""

queues = st.integers(0, QUEUES - 1)
roles = st.sampled_from(["source", "destination"])
ops = st.sampled_from(list(DiskOp))
chores = st.tuples(
    st.sampled_from(["write", "write", "scribble", "discard", "zeroes", "read", "flush"]),
    st.sampled_from(WINDOWS),
    st.integers(0, 15),
    st.integers(1, 12),
    queues,
)
errors = st.sampled_from([0, errno.EIO, errno.ENOSPC])
