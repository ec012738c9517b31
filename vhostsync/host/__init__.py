# SPDX-License-Identifier: Apache-2.0
"""The operating system: the kernel, signals, the service manager, files and sockets that are our own."""
