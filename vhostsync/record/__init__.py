# SPDX-License-Identifier: Apache-2.0
"""Which disk is the truth, where that is written down, and where the peer may differ."""
