"""What the YAML tree composes to, and that nothing but the schema's keys gets through.

The golden files hold the whole config of the default run and of every experiment, so that a change of any
default shows in review. BITMOE_WRITE_GOLDEN=1 writes them again.
"""

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bitmoe.config.choices import ActFormat, WeightFormat
from bitmoe.config.compose import compose
from bitmoe.config.errors import InputError
from bitmoe.config.help import group_choices
from bitmoe.config.locate import config_dir
from bitmoe.config.schema import BitStage, Config
from bitmoe.config.validate import problems

GOLDEN = Path(__file__).parent / "golden"
GROUPS = group_choices(config_dir())


@pytest.mark.parametrize("experiment", ["default", *GROUPS["experiment"]])
def test_compose_golden(experiment):
    overrides = [] if experiment == "default" else [f"experiment={experiment}"]
    composed = OmegaConf.to_yaml(OmegaConf.structured(compose(overrides)))
    file = GOLDEN / f"{experiment}.yaml"
    if os.environ.get("BITMOE_WRITE_GOLDEN") == "1":
        file.write_text(composed)
    assert composed == file.read_text()


def test_golden_files_all_compared():
    assert {file.stem for file in GOLDEN.iterdir()} == {"default", *GROUPS["experiment"]}


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_every_experiment_works_on_its_smallest_world(experiment):
    config = compose([f"experiment={experiment}"])
    assert problems(config, config.parallel.smallest_world_size) == []
    assert config.run.name == experiment


@pytest.mark.parametrize("choice", [f"{group}={choice}" for group in GROUPS for choice in GROUPS[group]])
def test_every_choice_composes(choice):
    assert isinstance(compose([choice]), Config)


@pytest.mark.parametrize("debug", GROUPS["debug"])
def test_debug_beats_experiment(debug):
    assert compose(["experiment=paper_700m", f"debug={debug}"]).run.name == debug


def test_command_line_beats_debug():
    assert compose(["debug=one_step", "run.steps=7"]).run.steps == 7


@pytest.mark.parametrize(
    ("model", "paper"),
    [
        ("700m", (24, 1536, 4096, 24)),
        ("1.3b", (24, 2048, 5460, 32)),
        ("3b", (26, 3200, 8640, 32)),
        ("7b", (32, 4096, 11008, 32)),
    ],
)
def test_paper_shapes(model, paper):
    shape = compose([f"model={model}"]).model
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads) == paper


@pytest.mark.parametrize(("size", "aligned"), [("1.3b", 5504), ("3b", 8704)])
def test_aligned_twin_differs_in_ffn_alone(size, aligned):
    plain, twin = compose([f"model={size}"]), compose([f"model={size}_aligned"])
    assert twin.model.ffn_hidden_size == aligned == -(-plain.model.ffn_hidden_size // 128) * 128
    twin.model.ffn_hidden_size = plain.model.ffn_hidden_size
    assert twin == plain


def test_a48_second_stage():
    first, second = compose(["quant=a48"]).quant.stages
    assert first == BitStage()
    int4, int8 = ActFormat.int4, ActFormat.int8
    assert second == BitStage(start=0.95, qkv=int4, o=int8, o_keep=0.5, gate_up=int4, down=int8)


def test_none_quantizes_nothing():
    quant = compose(["quant=none"]).quant
    assert quant.weights is WeightFormat.none
    assert {quant.stages[0].qkv, quant.stages[0].o, quant.stages[0].gate_up, quant.stages[0].down} == {ActFormat.none}


@pytest.mark.parametrize(
    ("override", "key", "fragment"),
    [
        ("model.hedas=3", "model.hedas", "did you mean model.num_attention_heads?"),
        ("+model.hedas=3", "model.hedas", "did you mean model.num_attention_heads?"),
        ("++model.num_layer=3", "model.num_layer", "did you mean model.num_layers?"),
        ("+parallel.smallest_world_size=3", "parallel.smallest_world_size", "there is no such key"),
        ("+foo=1", "foo", "there is no such key"),
        ("expriment=paper_7b", "expriment", "did you mean experiment?"),
        ("+quant.stages.1.keep=1", "quant.stages[1].keep", "did you mean quant.stages[1].o_keep?"),
        ("quant.stages=[{start:0,qvk:int4}]", "quant.stages[].qvk", "did you mean quant.stages[].qkv?"),
        ("model.num_layers=four", "model.num_layers", "a value of type int"),
        ("model.num_layers=4.5", "model.num_layers", "a value of type int"),
        ("model.num_layers=null", "model.num_layers", "not Optional"),
        ("optim.lr=high", "optim.lr", "a value of type float"),
        ("parallel.sequence=maybe", "parallel.sequence", "not a valid bool"),
        ("data.path=a.txt", "data.path", "a value of type list of str"),
        ("model.activation=gelu", "model.activation", "relu2_glu|swiglu"),
        ("quant.stages=[{start:0,qkv:int7}]", "quant.stages[].qkv", "none|int8|int4|fp4"),
        ("quant=a4", "quant", "did you mean a48?"),
        ("model=99b", "model", "bitnet_2b4t"),
        ("model=null", "", "must be a string or a list"),
        ("run.name=???", "run.name", "no value"),
        ("run.name=${nowhere}", "run.name", "'nowhere' not found"),
        ("~run.name", "run.name", "does not support deletion"),
        ("run.steps=[1", "", "'run.steps=[1' is no override"),
    ],
)
def test_bad_override_names_key_and_cure(override, key, fragment):
    with pytest.raises(InputError) as refusal:
        compose([override])
    assert refusal.value.key == key
    assert fragment in str(refusal.value)


def test_unknown_key_in_a_file_names_the_file(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("num_layer: 3\n")
    (tmp_path / "config.yaml").write_text("defaults: [schema, model: mine, _self_]\n")
    with pytest.raises(InputError, match=r"model\.num_layer: .*model/mine\.yaml") as refusal:
        compose(folder=tmp_path)
    assert "did you mean model.num_layers?" in str(refusal.value)
