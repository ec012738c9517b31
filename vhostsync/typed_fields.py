# SPDX-License-Identifier: Apache-2.0
"""The values of a JSON text, held against the types that are declared for them. A checksum tells damage; it
does not tell what another program, or a person with an editor, has written."""

import os
import types
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

INTEGERS: Final = range(-(1 << 63), 1 << 64)  # what the operating system and the engine have room for


def typed(kind: Any, value: Any) -> Any:
    """`value` as one of `kind`: a plain type, `X | None`, a Literal, a StrEnum, a tuple (of a list) or a
    dataclass (of an object). TypeError where it is none."""
    return _reader(kind)(value)


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """What `typed` does for this kind. A host has thousands of such texts, and their types are the same."""
    origin = get_origin(kind)
    if origin is types.UnionType:
        (some,) = (each for each in get_args(kind) if each is not types.NoneType)
        read = _reader(some)
        return lambda value: None if value is None else read(value)
    if origin is tuple:
        return _tuple_reader(get_args(kind))
    if origin is Literal:
        return lambda value: _if(value in get_args(kind), kind, value)
    if is_dataclass(kind):
        return _dataclass_reader(kind)
    if issubclass(kind, StrEnum):
        return lambda value: kind(_if(value in list(kind), kind, value))
    # In JSON true is no number; in Python True is an int.
    if kind is int:
        return lambda value: _if(type(value) is int and value in INTEGERS, kind, value)
    if kind is str:
        return lambda value: _if(type(value) is str and is_text(value), kind, value)
    return lambda value: _if(type(value) is kind, kind, value)


def _if(fits: bool, kind: Any, value: Any) -> Any:
    if not fits:
        raise TypeError(f"{value!r:.40} is no {kind}")
    return value


def is_text(value: Any) -> bool:
    """One that may be a path, or a part of one."""
    try:
        return isinstance(value, str) and "\0" not in value and (value.isascii() or os.fsencode(value) != b"")
    except UnicodeEncodeError:
        return False


def _tuple_reader(kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    def read(value: Any) -> tuple[Any, ...]:
        if type(value) is not list:
            raise TypeError("no list")
        all_kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        readers = list(map(_reader, all_kinds))
        if len(value) != len(readers):
            raise TypeError(f"{len(value)} values and not {len(readers)}")
        return tuple(read(each) for read, each in zip(readers, value, strict=True))

    return read


def _dataclass_reader(kind: Any) -> Callable[[Any], Any]:
    readers = {name: _reader(hint) for name, hint in get_type_hints(kind).items()}
    needed = {
        each.name for each in fields(kind)
        if each.default is MISSING and each.default_factory is MISSING
    }  # fmt: skip

    def read(body: Any) -> Any:
        if type(body) is not dict:
            raise TypeError("no object")
        if unknown := body.keys() - readers.keys():
            raise TypeError(f"unknown: {sorted(unknown)}")
        if missing := needed - body.keys():
            raise TypeError(f"{sorted(missing)[0]} is missing")
        return kind(**{name: readers[name](value) for name, value in body.items()})

    return read
