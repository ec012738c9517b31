# SPDX-License-Identifier: Apache-2.0
"""One disk with all that belongs to it."""
