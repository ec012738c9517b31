# SPDX-License-Identifier: Apache-2.0
"""The arguments of `serve`, from what config.py declares, and the configuration that they make."""

import argparse
from typing import Final

from vhostsync.cli.argument_types import Parser
from vhostsync.cli.option_arguments import add_options, given_options
from vhostsync.config import OPERATION, SOCKET, STATE_RECORD, ServeConfig
from vhostsync.node.request import OPTION
from vhostsync.option_values import Answer, TakeOver

_SERVE_EXAMPLES: Final = """\
examples:
  vhostsync serve --socket-path /run/vm.sock --blk-file /disks/a.img
  vhostsync serve --socket-path /run/vm.sock --blk-file /dev/vg/vm --num-queues 4 --serial vm1
  qemu-system-x86_64 … -chardev socket,id=c,path=/run/vm.sock,reconnect=1 \\
      -device vhost-user-blk-pci,chardev=c,num-queues=4 \\
      -object memory-backend-memfd,id=m,size=1G,share=on -machine memory-backend=m

Sizes are bytes, or have a unit: 64M, 1GiB. Durations are seconds, or have a unit: 500ms, 10s.
It stays in the foreground; SIGTERM ends it cleanly. It exits 0 when told to end, 1 when it cannot
serve (the reason is on stderr), 2 when an option is wrong.
"""


ANSWERS: Final = {
    Answer.PROMOTE: "this disk is the current one from now on; the recorded one is lost for good",
    Answer.SAME_DISK: "this is the recorded current disk, although it cannot be recognised",
    Answer.NEW_DISK: "this disk is none that a record knows: begin a new record",
}


def add_serve(commands: "argparse._SubParsersAction[Parser]") -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a disk to a virtual machine",
        description="Serve a disk to a virtual machine over a vhost-user socket.",
        epilog=_SERVE_EXAMPLES,
    )
    groups = add_options(serve, ServeConfig)
    groups[SOCKET].add_argument(
        "--print-capabilities", action="store_true", help="print what this backend can do as JSON, and exit"
    )
    groups[OPERATION].add_argument(
        "--take-over", nargs="?", type=TakeOver, choices=[TakeOver.GUEST, TakeOver.GUEST_AND_LOG],
        default=TakeOver.NOTHING, const=TakeOver.GUEST, metavar="guest|guest-and-log",
        help="for one start: go on for the backend that has this control socket, while its guest runs, and "
        "perhaps on its stderr (`vhostsync upgrade` does that)",
    )  # fmt: skip
    groups[OPERATION].add_argument(
        OPTION, metavar="PATH",
        help="let the node that listens there start it (`vhostsync node`): prints the process, and does not "
        "wait for it",
    )  # fmt: skip
    answers = groups[STATE_RECORD].add_mutually_exclusive_group()
    for answer, meaning in ANSWERS.items():
        answers.add_argument(
            f"--{answer}", dest="answer", action="store_const", const=answer,
            help=f"answer to a start that was refused, for one start: {meaning}",
        )  # fmt: skip


def serve_config(arguments: argparse.Namespace) -> ServeConfig:
    """The configuration. ConfigError."""
    return ServeConfig(**given_options(arguments, ServeConfig), answer=arguments.answer)
