"""Reads JSON and TOML into frozen dataclasses, strictly, and checks what they hold.

Flows in: a type and a parsed value. Flows out: an instance, or a UserError that names the field and its value.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

from .errors import UserError

T = TypeVar("T")


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_positive(instance: Any, where: str, but: Collection[str] = ()) -> None:
    """Raises UserError unless every number of a dataclass, inside tuples too, is above 0 and finite."""
    for name, value in vars(instance).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool) and name not in but:
                require(0 < number < float("inf"), f"{where}.{name} must be above 0, is {value!r}")


def read(kind: type[T], value: Any, where: str) -> T:
    """Converts a parsed value to `kind`; every field of a dataclass without a default must be there, and no other."""
    return typing.cast(T, _read(kind, value, where))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's table. Raises UserError when it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not TOML: {error}; mend it") from error


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where} must be a list, is {value!r}")
        kinds = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        require(len(kinds) == len(value), f"{where} must have {len(kinds)} entries, has {len(value)}")
        return tuple(_read(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is Mapping:
        require(isinstance(value, dict), f"{where} must be an object, is {value!r}")
        return {name: _read(arguments[1], entry, f"{where}.{name}") for name, entry in value.items()}
    kinds = arguments if origin is UnionType else (kind,)
    if float in kinds and type(value) is int:
        value = float(value)
    parts = [k for k in kinds if dataclasses.is_dataclass(k)]
    if parts and type(value) not in kinds:  # one of several kinds of part, or one beside plain values
        fitting = (k for k in parts if isinstance(value, dict) and set(value) == _fields(k))
        return _read_dataclass(next(fitting, parts[0]), value, where)
    require(type(value) in kinds, f"{where} must be {' or '.join(k.__name__ for k in kinds)}, is {value!r}")
    return value


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    require(isinstance(value, dict), f"{where} must be an object, is {value!r}")
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    missing, unknown = sorted(needed - set(value)), sorted(set(value) - _fields(kind))
    problems = [f"lacks {missing}"] * bool(missing) + [f"has unknown {unknown}"] * bool(unknown)
    require(not problems, f"{where} {' and '.join(problems)}")
    return kind(**{name: _read(hints[name], value[name], f"{where}.{name}") for name in value})


def _fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
