# SPDX-License-Identifier: Apache-2.0
"""The arguments of `receive`, from what receive_config.py declares."""

import argparse
from typing import Final

from vhostsync.cli.argument_types import Parser
from vhostsync.cli.option_arguments import add_options, given_options
from vhostsync.receive.receive_config import ReceiveConfig

_RECEIVE: Final = """\
Receive a disk from another host: the image file or block device here becomes the destination of a mirror
there. One owner has it; what it has sent before a connection was lost never lands after the next one.
"""

_RECEIVE_EXAMPLES: Final = """\
how it goes, on two hosts a and b:
  b$ vhostsync receive --blk-file /disks/vm.img --create --listen 0.0.0.0:7070 \\
         --tls-certificates /etc/pki/vhostsync --control /run/vm.receive
  a$ vhostsync mirror start 'receive://b:7070?tls-certificates=/etc/pki/vhostsync' --create --wait
  b$ vhostsync --control /run/vm.receive status
  b$ vhostsync --control /run/vm.receive quit       # then the disk is this host's, for `serve` for example

The directory of certificates has ca-cert.pem on both hosts, server-cert.pem and server-key.pem on b,
client-cert.pem and client-key.pem on a; the name b must be in the server's certificate.
Two ports are used: that of --listen, and the one after it for the data.
The first owner that attaches the disk has it for good, whatever is restarted; only the operator of b gives
it to another one: vhostsync --control /run/vm.receive rededicate.
It needs qemu-nbd (qemu-utils). It stays in the foreground; SIGTERM ends it. It exits 0 when told to end, 1
when it cannot receive (the reason is on stderr), 2 when an option is wrong.
"""


def add_receive(commands: "argparse._SubParsersAction[Parser]") -> None:
    receive = commands.add_parser(
        "receive", help="receive a disk from another host, to be its mirror", description=_RECEIVE,
        epilog=_RECEIVE_EXAMPLES,
    )  # fmt: skip
    add_options(receive, ReceiveConfig)


def receive_config(arguments: argparse.Namespace) -> ReceiveConfig:
    """The configuration. ConfigError."""
    return ReceiveConfig(**given_options(arguments, ReceiveConfig))
