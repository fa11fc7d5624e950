"""Every key of the schema is found, documented and shown by help."""

from dataclasses import fields, is_dataclass

import pytest

from bitmoe.config.convert_schema import ConvertConfig
from bitmoe.config.help import command_help, group_choices
from bitmoe.config.keys import all_keys
from bitmoe.config.locate import config_dir
from bitmoe.config.schema import BitStage, Config

KEYS = {key.name: key for key in all_keys()}
CONVERT_KEYS = {key.name: key for key in all_keys(ConvertConfig)}


def test_all_keys_has_every_field_of_the_schema():
    groups = {f"{group.name}.{field.name}" for group in fields(Config) for field in fields(group.type)}
    assert set(KEYS) == groups | {f"quant.stages[].{field.name}" for field in fields(BitStage)}
    assert all(is_dataclass(group.type) for group in fields(Config))


@pytest.mark.parametrize("key", [*KEYS.values(), *CONVERT_KEYS.values()], ids=lambda key: key.name)
def test_every_key_is_documented(key):
    assert key.doc.endswith(".")
    assert "  " not in key.doc


def test_all_keys_of_a_flat_schema_are_its_fields():
    assert set(CONVERT_KEYS) == {field.name for field in fields(ConvertConfig)}
    assert (CONVERT_KEYS["to"].type, CONVERT_KEYS["to"].default) == ("bitmoe|hf|gguf|checkpoint|null", "null")
    assert (CONVERT_KEYS["packing"].type, CONVERT_KEYS["packing"].default) == ("2bit|1.6bit", "2bit")


@pytest.mark.parametrize(
    ("name", "kind", "default"),
    [
        ("model.num_layers", "int", "4"),
        ("model.vocab_size", "int|null", "null"),
        ("model.sub_norm", "bool", "true"),
        ("model.activation", "relu2_glu|swiglu", "relu2_glu"),
        ("quant.groups", "int", "1"),
        ("data.path", "list of str", "[]"),
        ("quant.stages", "list of BitStage", "one, of the defaults below"),
    ],
)
def test_key_type_and_default(name, kind, default):
    assert (KEYS[name].type, KEYS[name].default) == (kind, default)


def test_command_help_lists_every_group_choice_and_key():
    text = command_help("pretrain", "What it does.")
    words = set(text.replace(",", " ").split())
    for group, choices in group_choices(config_dir()).items():
        assert {group, *choices} <= words
    assert set(KEYS) <= words
    assert "What it does." in text
