# SPDX-License-Identifier: Apache-2.0
"""Units of size."""

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
