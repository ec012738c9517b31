# SPDX-License-Identifier: Apache-2.0
"""The command line: from words to a command that runs; exit codes.

`vhostsync --socket-path=… --blk-file=…` without a word means `serve`: that is how programs call a
vhost-user backend (QEMU docs/interop/vhost-user.rst, "Backend program conventions").

Only what parsing needs is imported here, so that --help and --print-capabilities are quick and work without
the C extension."""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

from vhostsync import config
from vhostsync.cli.arguments import make_parser
from vhostsync.cli.exporter_arguments import exporter_config
from vhostsync.cli.node_arguments import node_config
from vhostsync.cli.receive_arguments import receive_config
from vhostsync.cli.serve_arguments import serve_config
from vhostsync.errors import ConfigError, UnreachableError, VhostsyncError
from vhostsync.exporter.exporter_config import ExporterConfig
from vhostsync.node.node_config import NodeConfig
from vhostsync.option_values import TakeOver
from vhostsync.printable import printable
from vhostsync.receive.receive_config import ReceiveConfig

if TYPE_CHECKING:
    from vhostsync.control.found_socket import Control

CAPABILITIES: Final = {"type": "block", "features": ["read-only", "blk-file"]}

Config = TypeVar("Config")

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_TIMED_OUT: Final = 4
EXIT_INTERRUPTED: Final = 130

_OF_THE_PROGRAM: Final = ("-h", "--help", "--version", "--control")
"""Options that do not mean `serve` when they come first."""


def _with_serve(arguments: Sequence[str]) -> list[str]:
    """The arguments with the word `serve` where QEMU's conventions leave it out."""
    if arguments and arguments[0].startswith("-") and arguments[0].split("=")[0] not in _OF_THE_PROGRAM:
        return ["serve", *arguments]
    return list(arguments)


def _fill_standard_descriptors() -> None:
    """Where stdin, stdout or stderr is closed (`2>&-`), a disk that is opened later would get its number, and
    what is written to stderr would be written to the disk."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _serve(settings: config.ServeConfig, take_over: TakeOver) -> int:
    try:
        from vhostsync.daemon import run
    except ImportError as error:
        return _failed(f"{error} (the data plane is a C extension; `pip install .` builds it)", EXIT_FAILED)
    return run(settings, take_over)


def _receive(settings: ReceiveConfig) -> int:
    from vhostsync.receive.process import run

    return run(settings)


def _export(settings: ExporterConfig) -> int:
    from vhostsync.exporter.process import run

    return run(settings)


def _be_node(settings: NodeConfig) -> int:
    from vhostsync.node.process import run

    return run(settings, main)


def _operate(options: argparse.Namespace) -> int:
    import anyio

    from vhostsync.cli import operate

    return anyio.run(operate.run, getattr(operate, options.function), options)


def _upgrade(options: argparse.Namespace) -> int:
    import anyio

    from vhostsync.cli import upgrade

    return anyio.run(upgrade.run, options)


def _operate_group(options: argparse.Namespace, controls: "list[Control]") -> int:
    import anyio

    from vhostsync.cli import operate_group

    return anyio.run(operate_group.run, options, controls)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Ends the process itself where argparse does (--help, wrong
    usage)."""
    _fill_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        # Names of disks are not all ASCII, some encodings are. In a fork of a node it was done before.
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(_with_serve(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()  # here, where it can be said that it has failed
    except UnreachableError as error:
        return _failed(error, EXIT_UNREACHABLE)
    except VhostsyncError as error:
        return _failed(error, EXIT_FAILED)
    except TimeoutError:
        return _failed("The backend did not do that in time; it may still be at it.", EXIT_TIMED_OUT)
    except BrokenPipeError:  # the reader of our output is gone
        _drop_output()
        return EXIT_FAILED
    except OSError as error:  # its disk is full, for example
        _drop_output()
        return _failed(f"The output cannot be written: {error.strerror or error}.", EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run(words: list[str]) -> int:
    if words[:1] == ["serve"] and "--print-capabilities" in words:
        print(json.dumps(CAPABILITIES))
        return EXIT_OK
    parser = make_parser()
    options = parser.parse_args(words)
    if options.command == "serve":
        settings = _or_usage(parser, lambda: serve_config(options))
        return _serve(settings, options.take_over)
    if options.command == "receive":
        return _receive(_or_usage(parser, lambda: receive_config(options)))
    if options.command == "exporter":
        return _export(_or_usage(parser, lambda: exporter_config(options)))
    if options.command == "node":
        return _be_node(_or_usage(parser, lambda: node_config(options)))
    from vhostsync import log as logging

    logging.configure("text", "warning")  # to stderr: what a command prints may be for a script
    if options.command == "record":
        from vhostsync.record import record_report

        if options.where is not None and options.name is not None:
            parser.error("name the record by PATH or by --name, not by both")
        return record_report.run(options.where, options.name, as_json=options.json, remove=options.forget)
    if options.command in ("create", "list", "evacuate", "top"):
        from vhostsync.cli import host_commands

        command: Callable[[argparse.Namespace], int] = getattr(host_commands, options.function)
        return command(options)
    controls = _controls(options)
    if not controls:
        inherited = os.environ.get("VHOSTSYNC_CONTROL")
        if not inherited:
            parser.error("which backend? Give --name NAME or --control PATH, or set VHOSTSYNC_CONTROL")
        controls = [Path(inherited)]
    if len(controls) > 1 and (accepted := _accepted_by_one_alone(options)) is not None:
        parser.error(f"{accepted} is for one disk: switch that by itself")
    if len(controls) > 1 or options.command == "snapshot":
        return _operate_group(options, controls)
    options.control = controls[0]
    if options.command == "upgrade":
        return _upgrade(options)
    return _operate(options)


def _controls(options: argparse.Namespace) -> "list[Control]":
    """Of the backends that are named: one, or by some commands several."""
    if getattr(options, "group", None) is not None:
        from vhostsync.fleet.group import controls_of_group

        return controls_of_group(options.group)
    if isinstance(options.control, Path):
        return [options.control]
    controls: list[Control] = options.control or []
    names: list[str] = [options.name] if isinstance(options.name, str) else options.name or []
    if names:
        from vhostsync.fleet.known_disks import find_control

        controls = [*controls, *map(find_control, names)]
    return controls


def _accepted_by_one_alone(options: argparse.Namespace) -> str | None:
    given = [name for name in ("accept_unreadable", "accept_different") if getattr(options, name, False)]
    return f"--{given[0].replace('_', '-')}" if given else None


def _drop_output() -> None:
    """What could not be written would be tried again, and complained of, when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _or_usage(parser: argparse.ArgumentParser, make: Callable[[], Config]) -> Config:
    try:
        return make()
    except ConfigError as error:
        _usage(parser, str(error))


def _usage(parser: argparse.ArgumentParser, text: str) -> NoReturn:
    parser.exit(EXIT_USAGE, f"vhostsync: {printable(text)}\n")


def _failed(error: object, code: int) -> int:
    with suppress(OSError):  # the code tells at least that it has failed
        print(f"vhostsync: {printable(str(error))}", file=sys.stderr, flush=True)
    return code
