"""BitNet models that transformers saved: what comes in computes what transformers computes, or is refused."""

import json
import pickle
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitnet import pack_weights

from bitmoe.config.choices import ActFormat, Activation, Precision, TokenizerKind
from bitmoe.config.errors import InputError
from bitmoe.convert.hf_export import write_hf
from bitmoe.convert.hf_import import HFBitNetWeights
from bitmoe.data.bpe import train_bpe
from bitmoe.model.export_names import export_shapes, slots
from bitmoe.testing.reference_model import ReferenceModel
from bitmoe_kernels.weight_quant import ternarize

# Shapes: B = batch, S = sequence, V = vocabulary.

SHAPE = {
    "vocab_size": 288,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS = {
    "BitNet": (BitNetForCausalLM, BitNetConfig, {}),
    "tied BitNet": (BitNetForCausalLM, BitNetConfig, {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
    "Llama": (LlamaForCausalLM, LlamaConfig, {"head_dim": 48}),
    "tied Llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "hidden_act": "relu2"}),
}
# Makes predictions that are neither certain nor uniform.
HEAD_FACTOR = {"BitNet": 4, "tied BitNet": 3, "Llama": 4, "tied Llama": 1.7}
BITLINEAR = {}
OFFLINE = {"linear_class": "autobitlinear", "quantization_mode": "offline"}
ONLINE = {"linear_class": "autobitlinear", "quantization_mode": "online"}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    # transformers compiles its quantizers; as they are, they compute the same.
    monkeypatch.setattr(torch._dynamo.config, "disable", True)


@torch.no_grad()
def save_model(folder, name, quantization):
    """A random model as ``save_pretrained`` leaves it, matrices packed unless it is online."""
    torch.manual_seed(11)
    model_class, config_class, more = MODELS[name]
    model = model_class(config_class(**SHAPE, **more))
    for key, parameter in model.named_parameters():
        if "norm" in key:
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    model.get_output_embeddings().weight.mul_(HEAD_FACTOR[name])
    model.save_pretrained(folder)
    if quantization is not ONLINE:
        edit_tensors(folder, lambda tensors: pack(tensors, is_divisor=quantization is BITLINEAR))
    about = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"], **quantization}
    edit_config(folder, quantization_config=about)


def pack(tensors, is_divisor):
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        mean = tensors[name].abs().mean()
        tensors[name] = pack_weights((tensors[name] / mean).round().clamp(-1, 1))
        tensors[f"{name}_scale"] = (1 / mean if is_divisor else mean).view(1)


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    """Merge changes into config.json, into its quantization_config too; None removes a key."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    inner = content.get("quantization_config", {}) | changes.pop("quantization_config", {})
    content = content | changes | {"quantization_config": inner}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def checkpoint_tensors(source):
    """All layers stacked under their names in a checkpoint, as ``ReferenceModel`` takes them."""
    tensors = {}
    for slot in slots(source.config):
        tensors.setdefault(slot.key, []).append(source.read_slot(slot).float())
    stacked = {slot.key for slot in slots(source.config) if slot.layer is not None}
    return {key: torch.stack(parts) if key in stacked else parts[0] for key, parts in tensors.items()}


@pytest.mark.parametrize("quantization", [BITLINEAR, OFFLINE, ONLINE], ids=["bitlinear", "offline", "online"])
@pytest.mark.parametrize("name", MODELS)
def test_computes_what_transformers_computes(tmp_path, name, quantization):
    save_model(tmp_path, name, quantization)
    source = HFBitNetWeights(tmp_path, Precision.fp32)
    tokens_BS = torch.randint(0, 288, (2, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want_BSV = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens_BS).logits.double().log_softmax(-1)
        got_BSV = ReferenceModel(source.config, checkpoint_tensors(source)).logits(tokens_BS).double().log_softmax(-1)
    entropy = float(-(want_BSV.exp() * want_BSV).sum(-1).mean())
    assert 1 < entropy < 5.5
    kl = float((want_BSV.exp() * (want_BSV - got_BSV)).sum(-1).mean())
    # A value between two INT8 codes may fall to either side, so it is not zero.
    assert kl <= 1e-5


def test_config_is_the_models(tmp_path):
    save_model(tmp_path, "tied BitNet", OFFLINE)
    (tmp_path / "tokenizer.json").write_text(train_bpe(["some text, some more text"], 260))
    source = HFBitNetWeights(tmp_path, Precision.bf16)
    config = source.config
    assert (config.model.num_layers, config.model.hidden_size, config.model.ffn_hidden_size) == (2, 128, 192)
    assert (config.model.num_attention_heads, config.model.num_query_groups, config.model.head_dim) == (4, 2, 32)
    assert (config.model.vocab_size, config.model.vocab_multiple) == (288, 32)
    assert (config.model.activation, config.model.sub_norm) == (Activation.relu2_glu, True)
    assert (config.model.norm_eps, config.model.rope_theta) == (1e-6, 500000.0)
    assert config.model.tie_embeddings
    assert (config.moe.num_experts, config.quant.groups, config.context.seq_length) == (0, 1, 64)
    assert [stage.qkv for stage in config.quant.stages] == [ActFormat.int8]
    assert config.run.precision is Precision.bf16
    assert config.tokenizer.kind is TokenizerKind.file
    assert source.tokenizer.decode(source.tokenizer.encode("more")) == "more"


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("quantization", [BITLINEAR, OFFLINE], ids=["bitlinear", "offline"])
def test_packed_codes_and_scales_come_in_unchanged(tmp_path, quantization, precision):
    save_model(tmp_path, "BitNet", quantization)
    stored = load_file(tmp_path / "model.safetensors")
    source = HFBitNetWeights(tmp_path, precision)
    for name, shape in export_shapes(source.config).items():
        weight = source.read(name)
        assert weight.shape == shape
        assert weight.dtype == (torch.bfloat16 if precision is Precision.bf16 else torch.float32)
        if name.endswith("_proj.weight"):
            codes, scale = ternarize(weight)
            assert torch.equal(pack_weights(codes), stored[name])
            mean = stored[f"{name}_scale"].double()
            assert torch.equal(scale, (1 / mean if quantization is BITLINEAR else mean).float())


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "online"])
@pytest.mark.parametrize("overrides", [[], ["model.tie_embeddings=true"], ["model.sub_norm=true"]], ids=str)
def test_export_comes_back(dense_model, tmp_path, overrides, packed):
    model = dense_model("model.hidden_size=64", "model.ffn_hidden_size=96", *overrides)
    write_hf(model, tmp_path, packed=packed)
    source = HFBitNetWeights(tmp_path, Precision.fp32)
    assert list(export_shapes(source.config)) == list(export_shapes(model.config))
    for name in export_shapes(model.config):
        want, got = model.read(name), source.read(name)
        if packed and name.endswith("_proj.weight"):
            for ours, theirs in zip(ternarize(want), ternarize(got), strict=True):
                assert torch.equal(ours, theirs)
        else:
            assert torch.equal(want, got)


def test_matrix_of_zeros(tmp_path):
    save_model(tmp_path, "BitNet", OFFLINE)
    edit_tensors(tmp_path, lambda t: t.update({Q_PROJ: torch.full_like(t[Q_PROJ], 0b01010101)}))
    assert not HFBitNetWeights(tmp_path, Precision.fp32).read(Q_PROJ).any()


def test_positions_as_older_versions_wrote_them(tmp_path):
    save_model(tmp_path, "BitNet", OFFLINE)
    edit_config(tmp_path, rope_parameters=None, rope_theta=1234, rope_scaling=None)
    assert HFBitNetWeights(tmp_path, Precision.fp32).config.model.rope_theta == 1234


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    save_model(folder, "BitNet", OFFLINE)
    return folder


@pytest.fixture
def folder(packed_folder, tmp_path):
    """A packed BitNet to do something to."""
    return shutil.copytree(packed_folder, tmp_path / "model")


def refused(folder, *reasons):
    """Opening it and reading everything names the reasons, and writes nothing."""
    before = Counter(path.stat().st_size for path in folder.iterdir())
    with pytest.raises(InputError) as caught:
        read_all(HFBitNetWeights(folder, Precision.fp32))
    assert all(reason in str(caught.value) for reason in reasons), str(caught.value)
    assert Counter(path.stat().st_size for path in folder.iterdir()) == before


def read_all(source):
    for name in export_shapes(source.config):
        source.read(name)


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, ["config.json", "architectures", "Mixtral"]),
        ({"architectures": None}, ["architectures"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"hidden_size": 130}, ["130 rows"]),
        ({"num_hidden_layers": 10**9}, ["1000000000 layers"]),
        ({"num_hidden_layers": 3}, ["model.layers.2", "missing"]),
        ({"num_hidden_layers": 1}, ["model.layers.1", "no tensor of the model"]),
        ({"num_key_value_heads": 4}, ["k_proj", "[16, 128]", "[32, 128]"]),
        ({"intermediate_size": 194}, ["194 rows"]),
        ({"vocab_size": 150}, ["embed_tokens", "[288, 128]", "[150, 128]"]),
        ({"tie_word_embeddings": True}, ["lm_head.weight"]),
        ({"rms_norm_eps": -1}, ["rms_norm_eps"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["rope_type", "yarn"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ["rope_scaling", "linear"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quant_method", "gptq"]),
        ({"quantization_config": {"use_rms_norm": True}}, ["use_rms_norm", "norm"]),
        ({"quantization_config": {"linear_class": "linear"}}, ["linear_class"]),
        ({"quantization_config": {"modules_to_not_convert": []}}, ["modules_to_not_convert"]),
        ({"quantization_config": {"quantization_mode": "online"}}, ["weight_scale", "no tensor of the model"]),
        ({"quantization_config": {"linear_class": "bitlinear"}}, ["_scale", "'autobitlinear'"]),
    ],
    ids=str,
)
def test_config_that_does_not_fit_is_refused(folder, changes, reasons):
    edit_config(folder, **changes)
    refused(folder, *reasons)


def test_inverse_scale_of_the_other_convention_is_refused(tmp_path):
    save_model(tmp_path, "BitNet", BITLINEAR)
    edit_config(tmp_path, quantization_config=OFFLINE)
    refused(tmp_path, "_scale", "'bitlinear'", "'autobitlinear'")


@pytest.mark.parametrize(
    ("name", "value", "reasons"),
    [
        (f"{Q_PROJ}_scale", torch.tensor([0.0]), ["is 0"]),
        (f"{Q_PROJ}_scale", torch.tensor([-0.02]), ["-0.02"]),
        (f"{Q_PROJ}_scale", torch.tensor([torch.nan]), ["NaN"]),
        (f"{Q_PROJ}_scale", torch.tensor([torch.inf]), ["infinity"]),
        (f"{Q_PROJ}_scale", torch.tensor([1e-7]), ["1e-07"]),
        (f"{Q_PROJ}_scale", torch.ones(2) / 50, ["[2]"]),
        (f"{Q_PROJ}_scale", torch.tensor([1]), ["I64"]),
        (f"{Q_PROJ}_scale", None, ["missing"]),
        (Q_PROJ, None, ["missing"]),
        (Q_PROJ, torch.full((32, 128), 0b11, dtype=torch.uint8), ["4096 bytes", "no ternary codes"]),
        (Q_PROJ, torch.zeros(128, 32, dtype=torch.uint8), ["[128, 32]", "[32, 128]"]),
        (Q_PROJ, torch.zeros(128, 128), ["F32", "U8"]),
        ("model.norm.weight", torch.full((128,), torch.nan), ["NaN"]),
        ("model.layers.0.mlp.up_proj.bias", torch.zeros(192), ["no tensor of the model"]),
    ],
)
def test_tensor_that_cannot_be_is_refused(folder, name, value, reasons):
    def edit(tensors):
        tensors.pop(name, None)
        tensors.update({} if value is None else {name: value})

    edit_tensors(folder, edit)
    refused(folder, name.removesuffix("_scale"), *reasons)


class Trap:
    """Leaves a mark when a pickle of it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_pickles_are_refused_unopened(folder, tmp_path, file):
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(pickle.dumps(Trap(tmp_path / "opened")))
    refused(folder, file, "can run code")
    assert not (tmp_path / "opened").exists()


def test_config_that_names_code_runs_none(folder):
    (folder / "trap.py").write_text("raise SystemExit('the code of the model ran')")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "trap.Trap", "AutoConfig": "trap.Trap"})
    read_all(HFBitNetWeights(folder, Precision.fp32))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100000, '{"a": "\\ud800"}'], ids=lambda text: text[:8])
def test_config_that_is_none_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")
