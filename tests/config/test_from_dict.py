"""A saved config comes back as it was; what does not fit the schema is refused with its key."""

import pytest
import yaml

from bitmoe.config.choices import Score
from bitmoe.config.compose import compose
from bitmoe.config.errors import InputError
from bitmoe.config.from_dict import config_from_dict
from bitmoe.config.schema import Config
from bitmoe.train.run_dir import config_dict


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["quant=a48", "quant.backward=8bit"],
        ["moe=none", "model.head_dim=48"],
        ["data=files", "data.path=[a.txt,b.txt]", "data.weights=[1,2.5]"],
    ],
    ids=str,
)
def test_what_was_saved_comes_back(overrides):
    config = compose(overrides)
    assert config_from_dict(config_dict(config)) == config
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(config_dict(config)))) == config


def test_keys_left_out_are_defaults():
    assert config_from_dict({}) == Config()
    config = config_from_dict({"moe": {"score": "sigmoid"}, "optim": {"lr": 1}})
    assert config.moe.score is Score.sigmoid
    assert type(config.optim.lr) is float


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"modell": {}}, "modell"),
        ({"model": {"layers": 3}}, "model.layers"),
        ({"quant": {"stages": [{"start": 0}, {"begin": 1}]}}, r"quant.stages\[1\].begin"),
        ({"model": {"num_layers": "4"}}, "model.num_layers"),
        ({"model": {"num_layers": 4.0}}, "model.num_layers"),
        ({"model": {"num_layers": True}}, "model.num_layers"),
        ({"model": {"num_layers": None}}, "model.num_layers"),
        ({"model": {"head_dim": "x"}}, "model.head_dim"),
        ({"model": {"sub_norm": 1}}, "model.sub_norm"),
        ({"moe": {"score": "relu"}}, "moe.score"),
        ({"moe": {"score": ["softmax"]}}, "moe.score"),
        ({"model": []}, "model"),
        ({"data": {"path": "a.txt"}}, "data.path"),
        ({"data": {"path": [3]}}, r"data.path\[0\]"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(tree, key):
    with pytest.raises(InputError, match=f"^{key}: "):
        config_from_dict(tree)
