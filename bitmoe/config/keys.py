"""Every key of a schema with its type, default and documentation, for help texts and error messages.

A schema documents a field by the string literal under it, which Python throws away; it is read back from
the source.
"""

import ast
import inspect
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum, EnumMeta
from functools import cache
from types import NoneType
from typing import Any

from bitmoe.config.schema import Config


@dataclass(frozen=True)
class Key:
    """One key of the schema: dotted name, type as a user writes it, default, documentation."""

    name: str
    type: str
    default: str
    doc: str


@cache
def all_keys(schema: type = Config) -> tuple[Key, ...]:
    """Every key of a command's schema in its order; ``quant.stages[].start`` is a key of each stage."""
    return tuple(_keys_of(schema, "", _field_docs(schema)))


def _keys_of(kind: type, prefix: str, docs: dict[tuple[str, str], str]) -> list[Key]:
    keys = []
    for field in fields(kind):
        if is_dataclass(field.type):
            keys += _keys_of(field.type, f"{prefix}{field.name}.", docs)
            continue
        default = field.default if field.default is not MISSING else field.default_factory()
        doc = docs[kind.__name__, field.name]
        keys.append(Key(prefix + field.name, _type_name(field.type), _default_text(default), doc))
        for element in filter(is_dataclass, getattr(field.type, "__args__", ())):
            keys += _keys_of(element, f"{prefix}{field.name}[].", docs)
    return keys


def _field_docs(schema: type) -> dict[tuple[str, str], str]:
    """The string literal under each field, by the names of class and field, in the module of a schema."""
    return {
        (node.name, field.target.id): " ".join(below.value.value.split())
        for node in ast.parse(inspect.getsource(inspect.getmodule(schema))).body
        if isinstance(node, ast.ClassDef)
        for field, below in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def _type_name(kind: Any) -> str:
    if isinstance(kind, EnumMeta):
        return "|".join(member.name for member in kind)
    arguments = [_type_name(argument) for argument in getattr(kind, "__args__", ())]
    if getattr(kind, "__origin__", None) is list:
        return f"list of {arguments[0]}"
    return "|".join(arguments) or ("null" if kind is NoneType else kind.__name__)


def _default_text(default: Any) -> str:
    if isinstance(default, Enum):
        return default.name
    if isinstance(default, list) and default:
        return "one, of the defaults below"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(default)
