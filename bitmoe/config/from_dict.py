"""The inverse of ``bitmoe.train.run_dir.config_dict``: a saved config as dataclasses, without Hydra.

A key that the schema does not have is refused, and so is a value of another type. A key that the saved config lacks
was written before the key existed, and takes the schema's default. Values are not checked further: ``validate`` does.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import NoneType
from typing import Any, get_args, get_origin

from bitmoe.config.errors import InputError
from bitmoe.config.schema import Config


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """A config from nested dicts and lists of plain values, enums by their value.

    Raises:
        InputError: a key that the schema does not have, or a value of another type.
    """
    return _value(tree, Config, "")


def _value(value: Any, kind: Any, key: str) -> Any:
    """``value`` as what the schema says stands at ``key``."""
    if is_dataclass(kind):
        return _dataclass(value, kind, key)
    if get_origin(kind) is list:
        (element,) = get_args(kind)
        items = _checked(value, list, key)
        return [_value(item, element, f"{key}[{i}]") for i, item in enumerate(items)]
    if NoneType in get_args(kind):
        (known,) = set(get_args(kind)) - {NoneType}
        return None if value is None else _value(value, known, key)
    if issubclass(kind, Enum):
        return _choice(value, kind, key)
    if kind is float and type(value) is int:
        return float(value)
    return _checked(value, kind, key)


def _dataclass(value: Any, kind: type, key: str) -> Any:
    prefix = f"{key}." if key else ""
    types = {field.name: field.type for field in fields(kind)}
    tree = _checked(value, dict, key)
    for name in tree:
        if name not in types:
            raise InputError(
                "there is no such key", fix="read it with the version that wrote it", key=f"{prefix}{name}"
            )
    return kind(**{name: _value(item, types[name], f"{prefix}{name}") for name, item in tree.items()})


def _choice(value: Any, kind: type[Enum], key: str) -> Enum:
    choices = {member.value: member for member in kind}
    if not isinstance(value, str) or value not in choices:
        raise InputError(
            f"{value!r} is none of {', '.join(choices)}", fix=f"for example {next(iter(choices))}", key=key
        )
    return choices[value]


def _checked(value: Any, kind: type, key: str) -> Any:
    # type() and not isinstance(): True is no number.
    if type(value) is not kind:
        raise InputError(f"{value!r} is not of the type {kind.__name__}", fix="restore the saved config", key=key)
    return value
