# SPDX-License-Identifier: Apache-2.0
"""Options that are declared of a configuration (option.py), as arguments."""

import argparse
from dataclasses import Field
from typing import Any

from vhostsync.cli.argument_types import checked
from vhostsync.limit_options import LimitOptions
from vhostsync.option import FLAG, Option, options_of


def add_options(parser: argparse.ArgumentParser, config: type) -> "dict[str, argparse._ArgumentGroup]":
    """All of them, under their headings."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for each, declared in options_of(config):
        if declared.group not in groups:
            groups[declared.group] = parser.add_argument_group(declared.group)
        _add_option(groups[declared.group], each, declared)
    return groups


def given_options(arguments: argparse.Namespace, config: type) -> dict[str, Any]:
    """What was given, by the configuration's fields; the rest keeps its default."""
    given: dict[str, Any] = {}
    for each, declared in options_of(config):
        value = getattr(arguments, each.name)
        if value is not None:
            given[each.name] = tuple(value) if declared.repeatable else value
    return given


def _add_option(group: argparse._ArgumentGroup, each: "Field[Any]", declared: Option) -> None:
    """What is not given stays None."""
    kind, word = declared.kind, declared.default_word(each.default)
    told: dict[str, Any] = {"dest": each.name, "help": declared.help + (f" (default {word})" if word else "")}
    if kind is FLAG:
        told |= {"action": "store_true", "default": None}
    else:
        told |= {"type": checked(kind.parse, kind.metavar), "metavar": kind.metavar}
    if declared.repeatable:
        told["action"] = "append"
    if declared.required:
        told["required"] = True
    group.add_argument(declared.flag, **told)


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The limits of `serve` as arguments of `limit`: --limit-bps is --bps, and `bps` in what was parsed."""
    for each, declared in options_of(LimitOptions):
        kind = declared.kind
        parser.add_argument(
            declared.flag.replace("--limit-", "--"), dest=each.name.removeprefix("limit_"),
            help=declared.help, type=checked(kind.parse, kind.metavar), metavar=kind.metavar,
        )  # fmt: skip
