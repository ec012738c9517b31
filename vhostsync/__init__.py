# SPDX-License-Identifier: Apache-2.0
"""vhostsync: a running guest on a mirrored disk, moved to the other disk on command."""

__version__ = "0.2.0"
