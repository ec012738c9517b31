# SPDX-License-Identifier: Apache-2.0
"""Disks. kinds.py has the protocol that each kind of disk fulfils and the table of kinds; local.py are those
at a path, image files (file.py) and block devices (block.py)."""
