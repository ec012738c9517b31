# SPDX-License-Identifier: Apache-2.0
"""The vhost-user protocol, backend side: messages (wire), session (state table, no I/O), transport (socket
and descriptors), server (connections)."""
