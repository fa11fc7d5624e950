"""The compressed-tensors format: our packing against its own, and what transformers computes from a folder with it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitmoe.config.errors import InputError
from bitmoe.convert.codes import is_ternary, ternary_matrix
from bitmoe.convert.compressed_format import pack_int2, read_compressed, unpack_int2, write_compressed
from bitmoe.convert.written_exports import CompressedExport
from bitmoe.model.export_names import export_shapes
from bitmoe.testing.reference_model import ReferenceModel
from bitmoe.train.safetensors_shards import Shards

# Shapes: B = batch, S = sequence, V = vocabulary, O = output rows, I = input columns.

SIZES = [
    "model.hidden_size=128",
    "model.ffn_hidden_size=256",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
]
MODELS = {
    "Llama": [*SIZES, "model.head_dim=48"],
    "tied Llama with ReLU2": [*SIZES, "model.activation=relu2_glu", "model.tie_embeddings=true"],
}
# Makes predictions that are neither certain nor uniform.
HEAD_FACTOR = {"Llama": 4, "tied Llama with ReLU2": 1.7}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def write(dense_model, tmp_path):
    """``write(name, dtype)``: one of ``MODELS``, random, in the folder of the test."""

    def write(name="Llama", dtype=torch.float32):
        model = dense_model(*MODELS[name])
        head = "output_layer.weight"
        model.weights[head if head in model.weights else "embedding.word_embeddings.weight"] *= HEAD_FACTOR[name]
        model.weights = {key: value.to(dtype) for key, value in model.weights.items()}
        write_compressed(model, tmp_path, lambda name: None, {"eos_token_id": 256})
        return model

    return write


@pytest.fixture
def load(tmp_path):
    """The folder of the test in transformers, with the arguments of ``from_pretrained``."""
    pytest.importorskip("compressed_tensors", reason="transformers reads the format with this package")
    return lambda **kwargs: AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs).eval()


def random_tokens():
    return torch.randint(0, 259, (2, 48), generator=torch.Generator().manual_seed(3))


def reference_logits(model):
    """The training forward with 8-bit inputs; predictions must not be trivial."""
    weights = {key: value.float() for key, value in model.weights.items()}
    with torch.no_grad():
        logits_BSV = ReferenceModel(model.config, weights).logits(random_tokens())[..., :259]
    log_p_BSV = logits_BSV.double().log_softmax(-1)
    assert 1 < float(-(log_p_BSV.exp() * log_p_BSV).sum(-1).mean()) < 5.3
    return logits_BSV


@torch.no_grad()
def mean_kl(model, theirs):
    want_BSV = reference_logits(model).double().log_softmax(-1)
    got_BSV = theirs(random_tokens()).logits.double().log_softmax(-1)
    return float((want_BSV.exp() * (want_BSV - got_BSV)).sum(-1).mean())


def test_packed_words():
    place = torch.arange(64)
    codes_OI = ((7 * place + place // 5) % 3 - 1).to(torch.int8).view(2, 32)
    words_OW = pack_int2(codes_OI)
    assert words_OW.dtype == torch.int32
    assert [f"{word & 0xFFFFFFFF:x}" for word in words_OW.flatten().tolist()] == [
        *("6799e679", "99e6799e"),
        *("e6799e67", "799e6799"),
    ]
    assert torch.equal(unpack_int2(words_OW), codes_OI)


def test_package_packs_the_same():
    pack_quantized = pytest.importorskip("compressed_tensors.compressors.pack_quantized", reason="not installed")
    codes_OI = torch.randint(-1, 2, (7, 80), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    words_OW = pack_int2(codes_OI)
    assert torch.equal(words_OW, pack_quantized.pack_to_int32(codes_OI, 2))
    assert torch.equal(pack_quantized.unpack_from_int32(words_OW, 2, codes_OI.shape), codes_OI)


def test_what_is_no_code_is_refused():
    with pytest.raises(ValueError, match="24 codes a row"):
        pack_int2(torch.zeros(2, 24, dtype=torch.int8))
    with pytest.raises(ValueError, match="reach from -2 to 0"):
        pack_int2(torch.zeros(2, 16, dtype=torch.int8).index_fill_(0, torch.tensor([1]), -2))
    with pytest.raises(ValueError, match="16 of 32 codes are not ternary"):
        unpack_int2(torch.tensor([[0x6799E679, 0]], dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_file_holds_what_training_multiplies(write, tmp_path, name, dtype):
    model = write(name, dtype)
    export = CompressedExport(tmp_path, model.config)
    for tensor in export_shapes(model.config):
        if is_ternary(tensor, model.config):
            (codes_OI, scale_1), expected = export.ternary(tensor), ternary_matrix(tensor, model.read(tensor), 1)
            assert torch.equal(codes_OI, expected[0])
            assert torch.equal(scale_1, expected[1])
        else:
            assert torch.equal(export.numbers(tensor), model.read(tensor))
    torch.testing.assert_close(export.logits(random_tokens())[..., :259], reference_logits(model))


def test_tensors_are_named_and_shaped_as_vllm_takes_them(write, tmp_path):
    write()
    stored = {name: (s.dtype, s.shape) for name, s in Shards(tmp_path).stored.items() if "layers.1.mlp.up" in name}
    assert stored == {
        f"{UP}_packed": ("I32", (256, 128 // 16)),
        f"{UP}_scale": ("F32", (256, 1)),
        f"{UP}_shape": ("I64", (2,)),
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["eos_token_id"]) == (["LlamaForCausalLM"], 256)
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_nearly_the_same(write, load, name):
    model = write(name)
    theirs = load()
    # It divides the largest input by 127.5 and not by 127, so codes of inputs differ.
    assert mean_kl(model, theirs) <= 5e-5
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert not hasattr(theirs.lm_head, "quantization_scheme")
    for tensor in filter(lambda tensor: is_ternary(tensor, model.config), export_shapes(model.config)):
        codes_OI, scale_1 = ternary_matrix(tensor, model.read(tensor), 1)
        assert torch.equal(theirs.get_parameter(tensor), codes_OI * scale_1)


def test_transformers_computes_a_bf16_model(write, load):
    model = write("Llama", torch.bfloat16)
    assert mean_kl(model, load(dtype=torch.float32)) <= 5e-5
    # Scales are rounded to bf16 there.
    theirs = load()
    assert theirs.dtype == torch.bfloat16
    assert mean_kl(model, theirs) <= 1e-4


@torch.no_grad()
def test_transformers_quantizes_inputs_by_token(write, load):
    write()
    theirs = load()
    theirs(random_tokens())
    up_proj = theirs.get_submodule(UP.removesuffix(".weight"))
    large_BSI = torch.eye(1, 128).expand(1, 2, 128)
    # Less than half of a step of the first token, and all there is of the second.
    small_BSI = torch.full((1, 1, 128), 0.003)
    inputs_BSI = torch.cat([large_BSI[:, :1].clamp(min=0.003), small_BSI], 1)
    without_BSO, with_BSO = up_proj(large_BSI), up_proj(inputs_BSI)
    assert torch.equal(with_BSO[:, 0], without_BSO[:, 0])
    row_sums_O = up_proj.weight.sum(-1) * 0.003
    torch.testing.assert_close(with_BSO[0, 1], row_sums_O, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["moe.num_experts=4"], "moe.num_experts=4"),
        (["quant.groups=2"], "quant.groups=2"),
        (["model.sub_norm=true"], "model.sub_norm=true"),
        (["model.ffn_hidden_size=132"], "model.layers.0.mlp.down_proj.weight has rows of 132"),
        (["quant=none"], "quant.weights=none"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(dense_model, tmp_path, overrides, reason):
    with pytest.raises(InputError, match=reason):
        write_compressed(dense_model(*SIZES, *overrides), tmp_path, lambda name: None, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("part", "damage", "reason"),
    [
        ("packed", lambda words: words * 0, "codes are not ternary"),
        ("scale", lambda scales: scales * torch.linspace(1, 2, len(scales)).unsqueeze(-1), "not one scale"),
        ("scale", lambda scales: scales[:1], "not one scale"),
        ("shape", lambda shape: shape.flip(0), r"up_proj.weight_shape is not \[256, 128\]"),
    ],
)
def test_damage_is_found(write, tmp_path, part, damage, reason):
    write()
    name = f"{UP}_{part}"
    path = tmp_path / Shards(tmp_path).stored[name].file
    tensors = load_file(path)
    save_file(tensors | {name: damage(tensors[name]).contiguous()}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=reason):
        read_compressed(Shards(tmp_path), UP)
