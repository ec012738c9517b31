# SPDX-License-Identifier: Apache-2.0
"""Measurements side by side: raw, qemu-storage-daemon, vhostsync. `./run bench`."""
