"""GGUF files: known bytes of the ternary types, codes and scales that come back, tokenizers, what cannot be written."""

import hashlib
import json

import gguf
import numpy as np
import pytest
import torch

from bitmoe.config.errors import InputError
from bitmoe.config.export_targets import refusals
from bitmoe.convert.gguf_format import read_gguf_codes, write_gguf
from bitmoe.convert.gguf_names import export_name, gguf_name, interleave_halves
from bitmoe.convert.gguf_tokenizer import gguf_vocabulary
from bitmoe.data.bpe import train_bpe
from bitmoe.data.tokenizer import ByteTokenizer, JsonTokenizer
from bitmoe.model.export_names import export_shapes
from bitmoe_kernels.weight_quant import ternarize


@pytest.mark.parametrize(
    ("kind", "size", "start", "sha1"),
    [
        ("TQ2_0", 132, "58811660055881166005588116600558", "bf1aa70a11ff0d35a80d77d0acb6ec36bf6d8087"),
        ("TQ1_0", 108, "465dd11874465dd11874465dd1187446", "2da139b8dce4767067223eb9ade9b22aca043659"),
    ],
)
def test_bytes_of_the_ternary_types(kind, size, start, sha1):
    numbers = np.arange(512)
    weights = (((7 * numbers + numbers // 5) % 3) - 1).astype(np.float32) * 0.5
    packed = gguf.quantize(weights, gguf.GGMLQuantizationType[kind]).tobytes()
    assert (len(packed), packed[:16].hex(), hashlib.sha1(packed).hexdigest()) == (size, start, sha1)


@pytest.mark.parametrize("type_name", ["tq1_0", "tq2_0"])
def test_codes_and_scales_come_back(gguf_model, tmp_path, type_name):
    source = gguf_model
    assert refusals(source.config, "gguf") == []
    written = []
    write_gguf(source, tmp_path / "model.gguf", type_name, ByteTokenizer(), written.append)
    assert written == list(export_shapes(source.config))
    groups, read = source.config.quant.groups, {}
    for name, codes, scale in read_gguf_codes(tmp_path / "model.gguf", source.config):
        by_columns = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected_codes, expected_scale = ternarize(source.read(name), groups, dim=int(by_columns))
        assert codes.dtype == torch.int8
        assert torch.equal(codes, expected_codes), name
        assert torch.equal(scale, expected_scale.half().float()), name
        read[name] = scale
    assert set(read) == {name for name in written if name.endswith("_proj.weight")}
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {export_name(tensor.name): tensor for tensor in reader.tensors}
    assert {name: tuple(reversed(t.shape.tolist())) for name, t in tensors.items()} == export_shapes(source.config)
    for name in set(written) - set(read):
        stored = torch.from_numpy(tensors[name].data.copy())
        kept = torch.float16 if name in ("model.embed_tokens.weight", "lm_head.weight") else torch.float32
        assert torch.equal(stored, source.read(name).to(kept)), name
    architecture = "bitnet" if source.config.model.sub_norm else "llama"
    assert reader.get_field("general.architecture").contents() == architecture
    assert reader.get_field(f"{architecture}.attention.head_count_kv").contents() == 4


def test_a_swapped_block_is_found(dense_model, tmp_path):
    source, file = dense_model(), tmp_path / "model.gguf"
    write_gguf(source, file, "tq2_0", ByteTokenizer())
    reader = gguf.GGUFReader(file, "r+")
    up, down = (next(t for t in reader.tensors if t.name == f"blk.1.ffn_{part}.weight") for part in ("up", "down"))
    up.data[3] = down.data[3, : up.data.shape[1]]
    reader.data.flush()
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj"):
        list(read_gguf_codes(file, source.config))


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        ("output_layer.weight", "lm_head", 1e6),
        ("decoder.layers.mlp.linear_fc2.weight", r"layers\.1\.mlp\.down_proj", float("nan")),
        ("decoder.layers.self_attention.linear_proj.weight", r"layers\.1\.self_attn\.o_proj", 1e20),
    ],
)
def test_values_that_fp16_lacks_are_named(dense_model, tmp_path, key, name, value):
    source = dense_model()
    source.weights[key][1, 5] = value
    with pytest.raises(InputError, match=name):
        write_gguf(source, tmp_path / "model.gguf", "tq1_0", ByteTokenizer())


def test_rows_of_a_head_are_interleaved():
    assert interleave_halves(torch.arange(12), heads=2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_names_without_a_place():
    assert gguf_name("model.layers.11.mlp.router.weight") == "blk.11.ffn_gate_inp.weight"
    for name in ("model.layers.0.mlp.router.expert_bias", "model.layers.0.mlp.shared_expert.up_proj.weight", "x"):
        with pytest.raises(InputError, match=name):
            gguf_name(name)
    with pytest.raises(InputError, match=r"blk\.0\.ssm_a"):
        export_name("blk.0.ssm_a.weight")


def test_bytes_as_a_vocabulary():
    vocabulary = gguf_vocabulary(ByteTokenizer(), 261)
    letters = json.loads(train_bpe(["a"], 257))["model"]["vocab"]
    assert set(vocabulary.tokens[:256]) == set(letters) - {"<|endoftext|>"}
    assert (vocabulary.tokens[ord("A")], vocabulary.tokens[ord(" ")], vocabulary.tokens[255]) == ("A", "\u0120", "\xff")
    assert vocabulary.tokens[256:] == ["<|endoftext|>", "<|bos|>", "<|pad|>", "<|unused_259|>", "<|unused_260|>"]
    assert [int(kind) for kind in vocabulary.types[254:]] == [1, 1, 3, 3, 3, 5, 5]
    assert len(vocabulary.merges) == 1
    with pytest.raises(InputError, match="259"):
        gguf_vocabulary(ByteTokenizer(), 258)


def test_a_trained_vocabulary():
    tokenizer = JsonTokenizer(train_bpe(["the other thing in the rain"] * 50, 280))
    vocabulary = gguf_vocabulary(tokenizer, 300)
    assert vocabulary.pre_tokenizer == "gpt-2"
    assert vocabulary.merges[0].split() == ["t", "h"]
    assert vocabulary.tokens[tokenizer.encode("the")[0]] == "the"
    assert (vocabulary.special.eos, int(vocabulary.types[tokenizer.eod_id])) == (tokenizer.eod_id, 3)
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == 300


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}]}},
    ],
)
def test_text_that_llama_cpp_would_split_otherwise(change):
    content = json.loads(train_bpe(["a b"], 257)) | change
    with pytest.raises(InputError, match="llama.cpp cannot split"):
        gguf_vocabulary(JsonTokenizer(json.dumps(content)), 300)
