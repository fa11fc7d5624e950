"""The transformers model computes the function of the reference model and goes through files unchanged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from bitmoe.config.errors import InputError
from bitmoe.infer import BitmoeConfig
from bitmoe.infer.packed_linear import PackedLinear


def tokens(*shape, seed=1):
    return torch.randint(3, 100, shape, generator=torch.Generator().manual_seed(seed))


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


@torch.no_grad()
def test_logits_are_those_of_the_reference(any_config, make_pair):
    model, reference = make_pair(any_config)
    ids = tokens(2, 33)
    got, wanted = model(ids).logits, reference.logits(ids)[..., :100]
    assert (got - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())
    assert torch.equal(got.argmax(-1), wanted.argmax(-1))


@torch.no_grad()
def test_one_position_at_a_time(any_config, make_pair):
    """Decoding, where products go another way, gives what the whole text gives."""
    model = make_pair(any_config).model
    ids = tokens(1, 12)
    cache, steps = None, []
    for position in range(ids.shape[1]):
        out = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache, steps = out.past_key_values, [*steps, out.logits]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["a4.8 in 2 groups", "tied", "sigmoid experts", "unquantized experts"])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_round_trip(name, shards, configs, make_pair, tmp_path):
    model = make_pair(configs[name]).model
    model.save_pretrained(tmp_path, **shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)
    loaded = load(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict() | {"architectures": ["BitmoeForCausalLM"]}
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
        assert loaded.state_dict()[key].dtype == value.dtype, key
    # Tensors of a file lie at other addresses, for which torch's products of plain numbers add in another order.
    torch.testing.assert_close(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits, rtol=1e-5, atol=1e-5)


def test_five_codes_a_byte_become_four(configs, make_pair, tmp_path):
    config = configs["softmax experts in 2 groups"]
    make_pair(config, packing="1.6bit").model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["packing"] == "1.6bit"
    loaded, wanted = load(tmp_path), make_pair(config).model
    assert loaded.config.packing == "2bit"
    for key, value in wanted.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize("cast", ["at load", "after"])
def test_casting_leaves_codes_and_scales(cast, configs, make_pair, tmp_path):
    model = make_pair(configs["sigmoid experts in 4 groups"]).model
    model.save_pretrained(tmp_path)
    halved = load(tmp_path, dtype=torch.bfloat16) if cast == "at load" else load(tmp_path).to(torch.bfloat16)
    for key, value in model.state_dict().items():
        got, kept = halved.state_dict()[key], "weight_scale" in key or "expert_bias" in key or "_proj" in key
        assert torch.equal(got, value if kept else value.bfloat16()), key
    assert halved(tokens(1, 9)).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(any_config, make_pair):
    model = make_pair(any_config).model
    texts = [tokens(length, seed=length) for length in (3, 11, 7)]
    ids = torch.stack([torch.nn.functional.pad(text, (11 - len(text), 0)) for text in texts])
    mask = torch.stack([torch.arange(11) >= 11 - len(text) for text in texts]).long()
    together = model(ids, attention_mask=mask).logits
    for row, text in zip(together, texts, strict=True):
        alone = model(text.unsqueeze(0)).logits[0]
        torch.testing.assert_close(row[-len(text) :], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_eager_attention_and_recorded_outputs(configs, make_pair):
    model = make_pair(configs["grouped queries in 2 groups"]).model
    wanted = model(tokens(1, 9)).logits
    model.set_attn_implementation("eager")
    out = model(tokens(1, 9), output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(out.logits, wanted, rtol=1e-4, atol=1e-4)
    assert [tuple(h.shape) for h in out.hidden_states] == [(1, 9, 64)] * 3
    assert [tuple(a.shape) for a in out.attentions] == [(1, 8, 9, 9)] * 2


@torch.no_grad()
def test_loss_and_kept_logits(configs, make_pair):
    model, reference = make_pair(configs["a8"])
    ids = tokens(2, 17)
    loss = model(ids, labels=ids).loss
    logits = reference.logits(ids)[..., :100]
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


def test_ternary_part_takes_an_eighth_of_bf16(configs, make_pair):
    model = make_pair(configs["wider than a block"]).model
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    packed = sum(buffer.nbytes for linear in linears for buffer in linear.buffers())
    as_bf16 = sum(2 * linear.in_features * linear.out_features for linear in linears)
    assert len(linears) == 14
    assert packed <= as_bf16 / 7.9


@torch.no_grad()
def test_model_without_head(configs, make_pair, tmp_path):
    model = make_pair(configs["a8"]).model
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    hidden = base(tokens(1, 9)).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), model(tokens(1, 9)).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["a4.8", "sigmoid experts", "unquantized experts"])
def test_model_without_a_file(name, configs, make_pair):
    model = AutoModelForCausalLM.from_config(make_pair(configs[name]).model.config)
    assert model(tokens(1, 9)).logits.isfinite().all()


def test_missing_tensors_are_refused(configs, make_pair, tmp_path):
    model = make_pair(configs["a8"]).model
    state = {key: value for key, value in model.state_dict().items() if "layers.1.self_attn.k_proj" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match="layers.1.self_attn.k_proj.weight"):
        load(tmp_path)


def test_config_is_read_as_written(configs, make_pair, tmp_path):
    BitmoeConfig(
        rope_theta=5e5,
        kv_bits=3,
        eos_token_id=[1, 2],
        input_formats=dict.fromkeys(("qkv", "o", "gate_up", "down"), "fp4"),
    ).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["rope_theta"], written["hidden_act"]) == ("bitmoe", 5e5, "relu2_glu")
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read) is BitmoeConfig
    assert {key: value for key, value in read.to_dict().items() if key in written} == written
    assert AutoConfig.from_pretrained(tmp_path, kv_bits=4).kv_bits == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("packing", "4bit"),
        ("kv_bits", 8),
        ("quant_groups", 0),
        ("quant_groups", 5),
        ("num_key_value_heads", 5),
        ("head_dim", 63),
        ("o_keep", 0.0),
        ("input_formats", {"qkv": "int8"}),
        ("input_formats", dict.fromkeys(("qkv", "o", "gate_up", "down"), "none")),
        ("num_experts", -1),
        ("num_experts", 4),
        ("router_bias", True),
    ],
)
def test_impossible_values_are_refused(key, value):
    changes = {"moe_intermediate_size": 64} if key == "num_experts" else {}
    with pytest.raises(ValueError, match=r"is impossible") as error:
        BitmoeConfig(**{key: value}, **changes)
    assert "fix:" in str(error.value)


def test_imports_without_megatron():
    """And without the training side of bitmoe."""
    root = Path(__file__).parents[2]
    program = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('megatron', 'hydra', 'omegaconf'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import bitmoe.infer
print(*(name for name in sys.modules if name.startswith('bitmoe.')))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    parts = {name.split(".")[1] for name in done.stdout.split()}
    assert parts == {"config", "infer"}


def test_pickles_are_not_read(make_pair, configs, tmp_path):
    model = make_pair(configs["tied"]).model
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
