# SPDX-License-Identifier: Apache-2.0
"""All disks of this host: those that state records know, and those whose backends run. Asked by their control
sockets alone; what is known of one that does not run, its record says."""
