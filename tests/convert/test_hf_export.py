"""What transformers computes from an exported folder, against the reference model with 8-bit inputs."""

import json
import weakref
from itertools import groupby
from math import prod

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from bitmoe.config.errors import InputError
from bitmoe.convert.hf_export import write_hf
from bitmoe.convert.hf_packing import unpack_rows
from bitmoe.model.export_names import export_shapes, slots
from bitmoe.testing.reference_model import ReferenceModel
from bitmoe_kernels.weight_quant import ternarize

# Shapes: B = batch, S = sequence, V = vocabulary.

SIZES = [
    "model.hidden_size=128",
    "model.ffn_hidden_size=256",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
]
BITNET = [*SIZES, "model.sub_norm=true", "model.activation=relu2_glu", "context.seq_length=48"]
MODELS = {
    "BitNet": BITNET,
    "tied BitNet": [*BITNET, "model.tie_embeddings=true", "model.rope_theta=500000", "model.norm_eps=1e-6"],
    "Llama": [*SIZES, "model.head_dim=48"],
    "tied Llama with ReLU2": [*SIZES, "model.activation=relu2_glu", "model.tie_embeddings=true"],
}
# Makes predictions that are neither certain nor uniform.
HEAD_FACTOR = {"BitNet": 4, "tied BitNet": 3.5, "Llama": 4, "tied Llama with ReLU2": 1.7}


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    # transformers compiles its quantizers; as they are, they compute the same.
    monkeypatch.setattr(torch._dynamo.config, "disable", True)


@pytest.fixture
def make_model(dense_model):
    """``make_model(name, dtype)``: one of ``MODELS``, random."""

    def make(name, dtype=torch.float32):
        model = dense_model(*MODELS[name])
        is_tied = model.config.model.tie_embeddings
        model.weights["embedding.word_embeddings.weight" if is_tied else "output_layer.weight"] *= HEAD_FACTOR[name]
        model.weights = {key: value.to(dtype) for key, value in model.weights.items()}
        return model

    return make


def compare(model, theirs):
    """Mean KL divergence in nats; predictions must not be trivial."""
    tokens_BS = torch.randint(0, 259, (2, 48), generator=torch.Generator().manual_seed(3))
    weights = {key: value.float() for key, value in model.weights.items()}
    with torch.no_grad():
        want_BSV = ReferenceModel(model.config, weights).logits(tokens_BS)[..., :259].double().log_softmax(-1)
        got_BSV = theirs(tokens_BS).logits.double().log_softmax(-1)
    entropy = float(-(want_BSV.exp() * want_BSV).sum(-1).mean())
    assert 1 < entropy < 5.3
    return float((want_BSV.exp() * (want_BSV - got_BSV)).sum(-1).mean())


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "online"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same(make_model, tmp_path, name, packed):
    model = make_model(name)
    write_hf(model, tmp_path, packed=packed)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == ("BitNetForCausalLM" if "BitNet" in name else "LlamaForCausalLM")
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "AutoBitLinear"
    assert type(theirs.lm_head) is torch.nn.Linear
    # A value between two INT8 codes may fall to either side, so the KL divergence is not zero.
    assert compare(model, theirs) <= 1e-5


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "online"])
def test_bf16_model(make_model, tmp_path, packed):
    model = make_model("BitNet", torch.bfloat16)
    write_hf(model, tmp_path, packed=packed)
    # transformers leaves what is not ternary in the dtype it is stored in, whatever dtype it is asked for.
    in_fp32 = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert compare(model, torch.nn.Module.float(in_fp32)) <= 1e-5
    # As it is stored, it runs in bf16: the fp32 scales are rounded, not an obstacle.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    assert compare(model, theirs) <= 0.01


def test_codes_and_scales_are_ours(make_model, tmp_path):
    model = make_model("BitNet")
    names = []
    write_hf(model, tmp_path, packed=True, progress=names.append)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == names
    stored = {name: read(tmp_path / file, name) for name, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    for name in export_shapes(model.config):
        if name.endswith("_proj.weight"):
            codes, scale = ternarize(model.read(name))
            assert torch.equal(unpack_rows(stored.pop(name)), codes)
            assert torch.equal(stored.pop(f"{name}_scale"), scale)
        else:
            assert torch.equal(stored.pop(name), model.read(name))
    assert not stored


def read(path, name):
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


@pytest.mark.parametrize(("packed", "mode"), [(True, "offline"), (False, "online")])
def test_config_says_what_a_scale_means(make_model, tmp_path, packed, mode):
    write_hf(make_model("BitNet"), tmp_path, packed=packed, token_ids={"eos_token_id": 256})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["linear_class"] == "autobitlinear"
    assert config["quantization_config"]["quantization_mode"] == mode
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, 256)


def test_large_layers_are_cut(make_model, tmp_path):
    model = make_model("Llama")
    largest_tensor = 128 * 259 * 4
    write_hf(model, tmp_path, packed=False, max_shard_bytes=largest_tensor)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 4
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < largest_tensor + 2000 for file in files)
    assert compare(model, AutoModelForCausalLM.from_pretrained(tmp_path)) <= 1e-5


class Counted:
    """A source that knows how many bytes of what it gave are still held."""

    def __init__(self, source):
        self.config, self._source = source.config, source
        self.held = self.most = 0

    def read(self, name, expert=None):
        tensor = self._source.read(name).clone()
        self.held += tensor.nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(tensor, self._release, tensor.nbytes)
        return tensor

    def _release(self, size):
        self.held -= size


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "online"])
def test_memory_is_that_of_a_layer(make_model, tmp_path, packed):
    source = Counted(make_model("Llama"))
    write_hf(source, tmp_path, packed=packed)
    shapes = export_shapes(source.config)
    layers = groupby(slots(source.config), key=lambda slot: slot.layer)
    largest = max(sum(4 * prod(shapes[n]) for slot in layer for n in slot.names) for _, layer in layers)
    assert source.most <= largest


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["moe.num_experts=4"], "moe.num_experts=4"),
        (["quant.groups=2"], "quant.groups=2"),
        (["model.ffn_hidden_size=130"], "130 output rows"),
        (["model.sub_norm=true", "model.head_dim=48"], "head_dim"),
        (["quant=none"], "quant.weights=none"),
    ],
)
def test_what_transformers_cannot_hold_is_refused(dense_model, tmp_path, overrides, reason):
    with pytest.raises(InputError, match=reason):
        write_hf(dense_model(*SIZES, *overrides), tmp_path, packed=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "online"])
def test_nan_is_refused(make_model, tmp_path, packed):
    model = make_model("BitNet")
    model.weights["decoder.layers.mlp.linear_fc2.weight"][1, 2, 3] = torch.nan
    with pytest.raises(InputError, match=r"model.layers.1.mlp.down_proj.weight holds NaN"):
        write_hf(model, tmp_path, packed=packed)
