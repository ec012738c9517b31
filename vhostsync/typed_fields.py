# SPDX-License-Identifier: Apache-2.0
"""The values of a JSON text, held against the types that are declared for them. A checksum tells damage; it
does not tell what another program, or a person with an editor, has written."""

import os
import types
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

INTEGERS: Final = range(-(1 << 63), 1 << 64)  # what the operating system and the engine have room for


def typed(kind: Any, value: Any) -> Any:
    """`value` as one of `kind`: a plain type, `X | None`, a Literal, a StrEnum, a tuple (of a list) or a
    dataclass (of an object). TypeError where it is none."""
    origin = get_origin(kind)
    if origin is types.UnionType:
        (some,) = (each for each in get_args(kind) if each is not types.NoneType)
        return None if value is None else typed(some, value)
    if origin is tuple:
        return _tuple_of(get_args(kind), value)
    if origin is Literal:
        fits = value in get_args(kind)
    elif is_dataclass(kind):
        return _filled(kind, value)
    elif issubclass(kind, StrEnum):
        fits = value in list(kind)
        value = kind(value) if fits else value
    else:
        # In JSON true is no number; in Python True is an int.
        fits = type(value) is kind and (kind is not int or value in INTEGERS)
        fits = fits and (kind is not str or is_text(value))
    if not fits:
        raise TypeError(f"{value!r:.40} is no {kind}")
    return value


def is_text(value: Any) -> bool:
    """One that may be a path, or a part of one."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _tuple_of(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if type(value) is not list:
        raise TypeError("no list")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(value) != len(kinds):
        raise TypeError(f"{len(value)} values and not {len(kinds)}")
    return tuple(typed(kind, each) for kind, each in zip(kinds, value, strict=True))


def _filled(kind: Any, body: Any) -> Any:
    if type(body) is not dict:
        raise TypeError("no object")
    hints, known = _types_of(kind), fields(kind)
    if unknown := body.keys() - hints.keys():
        raise TypeError(f"unknown: {sorted(unknown)}")
    for each in known:
        if each.name not in body and each.default is MISSING and each.default_factory is MISSING:
            raise TypeError(f"{each.name} is missing")
    return kind(**{name: typed(hints[name], value) for name, value in body.items()})


@cache
def _types_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
