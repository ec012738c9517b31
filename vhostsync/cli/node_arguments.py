# SPDX-License-Identifier: Apache-2.0
"""The arguments of `node`, from what node_config.py declares."""

import argparse
from typing import Final

from vhostsync.cli.argument_types import Parser
from vhostsync.cli.option_arguments import add_options, given_options
from vhostsync.node.node_config import NodeConfig

_NODE: Final = """\
Keep all that a backend needs loaded, and fork a backend whenever `vhostsync serve --from-node` asks: it
starts sooner, and the backends share the memory that they do not write to. It opens no disk. Each backend is
a process of its own, as always, with its own sandbox, log and control socket, and outlives the node.
"""

_NODE_EXAMPLES: Final = """\
examples:
  vhostsync node --listen /run/user/1000/vhostsync/node &
  vhostsync serve --from-node /run/user/1000/vhostsync/node --name vm1    # prints its process id
  vhostsync status --name vm1

The backends are this user's, with this process's limits (RLIMIT_MEMLOCK and RLIMIT_NOFILE count). After an
upgrade of the program start the node anew; backends that run go on as they are. docs/node.md has a unit.
It stays in the foreground; SIGTERM ends it. It exits 0 when told to end, 1 when it cannot listen (the reason
is on stderr), 2 when an option is wrong.
"""


def add_node(commands: "argparse._SubParsersAction[Parser]") -> None:
    node = commands.add_parser(
        "node", help="start backends quickly, and let them share memory", description=_NODE,
        epilog=_NODE_EXAMPLES,
    )  # fmt: skip
    add_options(node, NodeConfig)


def node_config(arguments: argparse.Namespace) -> NodeConfig:
    """The configuration. ConfigError."""
    return NodeConfig(**given_options(arguments, NodeConfig))
