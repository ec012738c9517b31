# SPDX-License-Identifier: Apache-2.0
"""The process of `exporter`: one page of metrics for all disks of this host."""
