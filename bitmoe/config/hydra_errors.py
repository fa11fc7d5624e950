"""Hydra's and OmegaConf's complaints in this project's form: the key, what is wrong, what would be right.

Hydra's own advice for an unknown key is to force it in with ``+``, which is wrong here.
"""

import difflib
import re

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from bitmoe.config.errors import InputError
from bitmoe.config.keys import all_keys
from bitmoe.config.schema import BitStage, Config

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)
"""What Hydra raises for bad overrides and files (a group set to null is a plain ValueError)."""


def input_error(error: Exception, schema: type = Config) -> InputError:
    """The InputError for one of COMPOSITION_ERRORS, raised while a config of ``schema`` was composed."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return InputError(f"there is no choice {choice!r}", fix=_suggestion(choice, error.options), key=group)
    if isinstance(error, OverrideParseException):
        what = f"{error.override!r} is no override: {error.message.splitlines()[0]}"
        return InputError(what, fix="GROUP=CHOICE or KEY=VALUE, quoted for the shell as in 'data.path=[a,b]'")
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if not isinstance(cause, OmegaConfBaseException):
        return InputError(str(error).strip())
    key = cause.full_key or ""
    if cause.object_type is BitStage and "." not in key:
        key = f"quant.stages[].{key}"
    file = re.match(r"In '(.+?)': ", str(error))
    where = f" (in {file[1]}.yaml)" if file and "/" in file[1] else ""
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return unknown_key(key, _siblings(key, schema), where)
    if isinstance(cause, MissingMandatoryValue):
        return InputError("it has no value", fix=f"{key}=VALUE", key=key)
    kind = {known.name: known.type for known in all_keys(schema)}.get(re.sub(r"\[\d+\]", "[]", key), "")
    expected = f"a value of type {kind}" if kind and isinstance(cause, ValidationError) else ""
    return InputError((cause.msg or str(cause)).splitlines()[0] + where, fix=expected, key=key)


def unknown_key(key: str, known: list[str], where: str = "") -> InputError:
    """A key the schema does not have, with the nearest of the names it has at that place."""
    parent, dot, name = key.rpartition(".")
    return InputError(f"there is no such key{where}", fix=_suggestion(name, known, parent + dot), key=key)


def _suggestion(name: str, known: list[str], prefix: str = "") -> str:
    """The known name that is nearest, as a whole or by one of its words; all of them if none is near."""
    by_word = {word: whole for whole in known for word in whole.split("_")}
    by_word |= {whole: whole for whole in known}
    near = difflib.get_close_matches(name, by_word, n=1)
    return f"did you mean {prefix}{by_word[near[0]]}?" if near else f"one of {', '.join(known)}"


def _siblings(key: str, schema: type) -> list[str]:
    """Names the schema has beside this key; at the top, the groups and the overlays."""
    parent, _, _ = key.rpartition(".")
    if not parent:
        return [*schema.__dataclass_fields__, *(["experiment", "debug"] if schema is Config else [])]
    prefix = f"{parent}."
    return [known.name.removeprefix(prefix) for known in all_keys(schema) if known.name.startswith(prefix)]
