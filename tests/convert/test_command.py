"""``bitmoe convert`` from end to end: what it writes, says and refuses, and that nothing is left of what failed."""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitmoe.infer  # noqa: F401 (registers the packed model)
from bitmoe.config.choices import ActFormat, Activation, Precision
from bitmoe.config.convert_schema import ConvertConfig, GgufType, HfWeights, Packing, Target, validate_conversion
from bitmoe.config.errors import InputError
from bitmoe.config.schema import BitStage, Config, MoEConfig, QuantConfig
from bitmoe.convert import command
from bitmoe.convert.i2s_format import GgufReader
from bitmoe.convert.packed_manifest import verify_packed
from bitmoe.model.export_names import export_shapes
from bitmoe.testing.parity import make_engine
from bitmoe.testing.saved_model import load_logits, save, save_model
from bitmoe.train.sharded_weights import ShardedWeights
from bitmoe.train.weight_folder import WeightFolder

ROOT = Path(__file__).parents[2]
A48 = BitStage(0.5, qkv=ActFormat.int4, o_keep=0.5, gate_up=ActFormat.int4)
EXPERTS = MoEConfig(num_experts=4, ffn_hidden_size=64, shared_expert_size=64)


def tiny(moe=None, groups=1, stages=None, **model):
    config = Config(moe=moe or MoEConfig(), quant=QuantConfig(groups=groups, stages=stages or [BitStage()]))
    shape = {"vocab_size": 259, "hidden_size": 64, "ffn_hidden_size": 128, "num_layers": 2}
    config.model = replace(config.model, **shape | {"init_std": 0.2} | model)
    config.context.seq_length, config.run.steps, config.run.precision = 32, 20, Precision.fp32
    config.run.micro_batch_size, config.run.global_batch_size = 2, 4
    return config


MODELS = {
    "a48": tiny(EXPERTS, groups=2, stages=[BitStage(), A48]),
    "bitnet": tiny(num_query_groups=2),
    "llama": tiny(
        # Larger weights make a model that is not trained chaotic: rounding of the embedding to fp16 shows.
        hidden_size=256,
        ffn_hidden_size=512,
        activation=Activation.swiglu,
        sub_norm=False,
        init_std=0.02,
    ),
    "bitnet_cpp": tiny(hidden_size=128, init_std=0.02, tie_embeddings=True),
}


def save_models(folder):
    for name, config in MODELS.items():
        save_model(config, folder / name)


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    """Runs of four models, which no test changes."""
    folder = tmp_path_factory.mktemp("runs")
    ranks(1).run(save_models, folder)
    return folder


def convert(config):
    """What the command says; a refusal in place of it."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            validate_conversion(config)
            command.convert(config)
        except InputError as error:
            return f"refused: {error}"
    return said.getvalue()


def settings(runs, name, target, out, **rest):
    return ConvertConfig(source=str(runs / name), to=target, out=str(out), check_tokens=64, **rest)


def parity(out):
    return json.loads((out / "parity.json").read_text())


@pytest.mark.parametrize("packing", Packing)
def test_packed_model_is_what_training_computes(ranks, runs, tmp_path, packing):
    out = tmp_path / "out"
    said = ranks(1).run(convert, settings(runs, "a48", Target.bitmoe, out, packing=packing))[0]
    assert f"{out}: " in said
    assert "top-1 100.00%, mean KL 0.0e+00" in said
    assert "ternary codes identical" in said
    assert "warning: trained for 2 of 20 steps, in a8; converted in a48" in said
    verify_packed(out)
    assert parity(out)["limits"]["mean_kl"] == 1e-6
    tokens_BS = torch.randint(0, 259, (2, 32), generator=torch.Generator().manual_seed(3))
    checkpoint = runs / "a48" / "checkpoints" / "step_00000002"
    expected = ranks(1).run(load_logits, checkpoint, MODELS["a48"], tokens_BS)[0]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(tokens_BS).logits, expected)
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"] == [97, 98, 99]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("weights", HfWeights)
def test_hf_model_is_what_training_computes(ranks, runs, tmp_path, weights):
    out = tmp_path / "out"
    name = "llama" if weights is HfWeights.compressed else "bitnet"
    said = ranks(1).run(convert, settings(runs, name, Target.hf, out, hf_weights=weights))[0]
    report = parity(out)
    assert "parity with the training forward on 64 tokens" in said
    assert "warning" not in said
    assert report["mean_kl"] <= 1e-5
    assert (report["codes_different"], report["largest_difference"]) == (0, 0.0)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 256
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"] == [97, 98, 99]


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", GgufType.tq2_0), ("llama", GgufType.tq1_0), ("bitnet_cpp", GgufType.i2_s)]
)
def test_gguf_file_holds_the_codes_of_training(ranks, runs, tmp_path, name, kind):
    out = tmp_path / "out"
    said = ranks(1).run(convert, settings(runs, name, Target.gguf, out, gguf_type=kind))[0]
    assert "parity with the training forward on 64 tokens" in said
    report = parity(out)
    assert report["codes_different"] == 0
    assert report["largest_difference"] <= 2**-11
    assert report["mean_kl"] <= 1e-3
    file = out / f"model-{kind.value}.gguf"
    assert len(GgufReader(file).tensors) == len(export_shapes(MODELS[name]))


def test_weights_go_around_and_stay_the_same(ranks, runs, tmp_path):
    (checkpoint,) = (runs / "bitnet" / "checkpoints").iterdir()
    first, online, second = (tmp_path / name for name in ("first", "online", "second"))
    jobs = [
        settings(runs, checkpoint.relative_to(runs), Target.checkpoint, first),
        settings(tmp_path, "first", Target.hf, online, hf_weights=HfWeights.online),
        replace(settings(tmp_path, "online", Target.checkpoint, second), precision=MODELS["bitnet"].run.precision),
    ]
    for job in jobs:
        assert "parity with" in ranks(1).run(convert, job)[0]
    assert parity(second)["largest_difference"] == 0.0
    expected, found = ShardedWeights(checkpoint), WeightFolder(second)
    for name in export_shapes(MODELS["bitnet"]):
        assert torch.equal(expected.read(name), found.read(name))
    text = "any text <|endoftext|>"
    assert found.tokenizer.encode(text).tolist() == expected.tokenizer.encode(text).tolist()


def save_nan(config, run):
    engine = make_engine(config)
    with torch.no_grad():
        next(s for s in engine.sharded_state().values() if s.key.endswith("linear_proj.weight")).data[0, 0] = torch.nan
    return save(engine, run, 1)


def convert_spoiled(config, name):
    """Convert while the writer is made to spoil a tensor."""
    from safetensors.torch import load_file, save_file

    write = command.write_packed

    def write_wrongly(source, tokenizer, folder, *args):
        digests = write(source, tokenizer, folder, *args)
        for path in folder.glob("*.safetensors"):
            if name in (tensors := load_file(path)):
                tensors[name] = tensors[name].flip(0).contiguous()
                save_file(tensors, path, metadata={"format": "pt"})
        return digests

    command.write_packed = write_wrongly
    try:
        return convert(config)
    finally:
        command.write_packed = write


def test_wrong_export_leaves_nothing(ranks, runs, tmp_path):
    name = "model.layers.1.mlp.experts.gate_proj.weight"
    said = ranks(1).run(convert_spoiled, settings(runs, "a48", Target.bitmoe, tmp_path / "out"), name)[0]
    assert said.startswith(f"refused: {name} is not what the training forward computes with")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", [Target.bitmoe, Target.hf])
def test_nan_leaves_nothing(ranks, tmp_path, target):
    ranks(1).run(save_nan, MODELS["bitnet"], tmp_path / "runs" / "broken")
    said = ranks(1).run(convert, settings(tmp_path / "runs", "broken", target, tmp_path / "out"))[0]
    assert said.startswith("refused: model.layers.0.self_attn.o_proj.weight holds NaN")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("a48", Target.hf, "hf cannot hold this model:\n  moe.num_experts=4: "),
        ("a48", Target.gguf, "gguf cannot hold this model:\n  model.activation=relu2_glu: "),
        ("nowhere", Target.bitmoe, "source: "),
        (".", Target.bitmoe, "holds neither a checkpoint nor converted weights"),
    ],
)
def test_refusal_says_why_and_leaves_nothing(ranks, runs, tmp_path, name, target, message):
    said = ranks(1).run(convert, settings(runs, name, target, tmp_path / "new" / "out"))[0]
    assert said.startswith("refused: ")
    assert message in said
    assert list(tmp_path.iterdir()) == []


def bitmoe_convert(*arguments, cwd):
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "bitmoe", "convert", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_line(runs, tmp_path):
    done = bitmoe_convert(f"source={runs / 'a48'}", "to=bitmoe", "out=out", "check_tokens=32", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    warning, size, agreement = done.stdout.splitlines()
    assert warning == "warning: trained for 2 of 20 steps, in a8; converted in a48"
    assert size.startswith("out: ")
    assert "parity with the training forward on 32 tokens" in agreement
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = bitmoe_convert(f"source={runs / 'a48'}", "to=bitmoe", "out=out", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.splitlines() == ["error: out: out exists already", "fix: choose another folder, or remove it"]
    packed = bitmoe_convert("source=out", "to=hf", "out=other", cwd=tmp_path)
    assert packed.returncode == 2
    assert "is a packed model, which has no weights to convert" in packed.stderr
