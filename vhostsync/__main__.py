# SPDX-License-Identifier: Apache-2.0
"""The program: `vhostsync`, and `python -m vhostsync`.

Ctrl-C ends it without a traceback from here on, whatever is being loaded. What a command does about it is its
own; a second one, while the interpreter winds up, is ignored.
"""

import os
import signal
import sys
from typing import NoReturn

EXIT_INTERRUPTED = 130


def run() -> int:
    """The exit code of the command line."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not under nohup
    if interruptible:
        signal.signal(signal.SIGINT, _leave)
    try:
        if sys.argv[1:2] == ["serve"] and any(word.startswith("--from-node") for word in sys.argv):
            from vhostsync.node.request import run as ask_node  # nothing else is loaded: it is to be quick

            return ask_node(sys.argv[2:])
        from vhostsync.cli.main import main

        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return main()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave(_number: int, _frame: object) -> NoReturn:
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(run())
