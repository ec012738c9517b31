# SPDX-License-Identifier: Apache-2.0
"""The control socket: QEMU's machine protocol (QMP) on a unix socket. docs/control-protocol.md describes it.

qmp.py (bytes to requests, no sockets) <- server.py (sockets, clients) -> commands.py (requests to calls);
client.py is what the command line uses.
"""
