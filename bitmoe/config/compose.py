"""From the Hydra tree under conf/ to a checked dataclass.

Hydra and OmegaConf stop here and in ``bitmoe.__main__``: everything below gets a :class:`Config`. Importing
this module registers the schemas, so that Hydra refuses misspelt keys, wrong types and unknown choices while
it merges. Keys forced in with ``+`` or ``++`` pass Hydra; ``to_config`` refuses them, because a key that
nothing reads is a mistake.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bitmoe.config.convert_schema import ConvertConfig
from bitmoe.config.generate_schema import GenerateConfig
from bitmoe.config.hydra_errors import COMPOSITION_ERRORS, input_error, unknown_key
from bitmoe.config.locate import config_dir
from bitmoe.config.schema import Config

ConfigStore.instance().store(name="schema", node=Config)
ConfigStore.instance().store(name="convert_schema", node=ConvertConfig)
ConfigStore.instance().store(name="generate_schema", node=GenerateConfig)


def compose(overrides: Sequence[str] = (), folder: Path | None = None) -> Config:
    """The config that ``bitmoe <command> <overrides>`` gets, for tests and tools.

    Args:
        overrides: Hydra overrides, as on the command line.
        folder: where ``config.yaml`` and the groups lie; by default this project's.

    Raises:
        InputError: an override or a file does not fit the schema.
    """
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(folder or config_dir())):
            composed = hydra.compose("config", overrides=list(overrides))
    except COMPOSITION_ERRORS as error:
        raise input_error(error) from None
    return to_config(composed)


def to_config(composed: DictConfig, schema: type = Config) -> Any:
    """Hydra's composed config as plain dataclasses, enums and lists.

    Args:
        composed: what Hydra made of the primary config and the overrides.
        schema: the dataclass to return.

    Raises:
        InputError: a key that the schema does not have, a mandatory value left out, a broken interpolation.
    """
    for key, known in _unknown_keys(OmegaConf.to_container(composed), schema, ""):
        raise unknown_key(key, known)
    try:
        return OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise input_error(error, schema) from None


def _unknown_keys(values: Any, kind: type, prefix: str) -> Iterator[tuple[str, list[str]]]:
    """Every key without a field in its dataclass, dotted, with the names of the fields there are."""
    types = {field.name: field.type for field in fields(kind)}
    for key, value in values.items() if isinstance(values, dict) else ():
        path = f"{prefix}{key}"
        if key not in types:
            yield path, list(types)
        elif is_dataclass(types[key]):
            yield from _unknown_keys(value, types[key], f"{path}.")
        elif isinstance(value, list):
            for element in filter(is_dataclass, types[key].__args__):
                for i, item in enumerate(value):
                    yield from _unknown_keys(item, element, f"{path}[{i}].")
