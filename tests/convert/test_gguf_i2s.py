"""GGUF for bitnet.cpp: known bytes of I2_S, codes and scales that come back, a whole file, what is refused."""

import gguf
import numpy as np
import pytest
import torch

from bitmoe.config.errors import InputError
from bitmoe.config.export_targets import refusals
from bitmoe.convert.codes import ternary_matrix
from bitmoe.convert.gguf_format import read_gguf_codes, write_gguf
from bitmoe.convert.gguf_names import export_name
from bitmoe.convert.i2s_format import I2_S, GgufReader, i2s_bytes, pack_i2s, unpack_i2s
from bitmoe.data.tokenizer import ByteTokenizer
from bitmoe.model.export_names import export_shapes

BITNET = ["model.activation=relu2_glu", "model.sub_norm=true", "model.tie_embeddings=true"]


@pytest.fixture
def bitnet_model(dense_model):
    """BitNet b1.58 in small: rows of 640 are whole blocks of I2_S and not of llama.cpp's types."""
    return dense_model(*BITNET, "model.ffn_hidden_size=640")


def test_known_bytes():
    numbers = torch.arange(256)
    codes = (((7 * numbers + numbers // 5) % 3) - 1).to(torch.int8).view(2, 128)
    packed = pack_i2s(codes, torch.tensor([0.5]))
    assert (packed.nbytes, packed[:16].tobytes().hex()) == (96, "25429409502542940950254294095025")
    assert packed[64:].tobytes().hex() == "0000003f" + "00" * 28


@pytest.mark.parametrize("shape", [(1, 128), (3, 384), (64, 256)])
def test_codes_and_scale_come_back(shape):
    codes = torch.randint(-1, 2, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    scale = torch.tensor([0.0123456789])
    packed = pack_i2s(codes, scale)
    assert packed.nbytes == i2s_bytes(shape)
    found_codes, found_scale = unpack_i2s(packed, shape)
    assert found_codes.dtype == torch.int8
    assert torch.equal(found_codes, codes)
    assert torch.equal(found_scale, scale)


def test_bits_that_are_no_code():
    packed = pack_i2s(torch.zeros(1, 128, dtype=torch.int8), torch.ones(1))
    packed[5] |= 0b1100
    with pytest.raises(InputError, match="no ternary code"):
        unpack_i2s(packed, (1, 128))


def test_a_whole_file(bitnet_model, tmp_path):
    source, file, written = bitnet_model, tmp_path / "model.gguf", []
    assert refusals(source.config, "gguf i2_s") == []
    write_gguf(source, file, "i2_s", ByteTokenizer(), written.append)
    shapes = export_shapes(source.config)
    assert written == list(shapes)

    read = {name: matrix for name, *matrix in read_gguf_codes(file, source.config)}
    assert set(read) == {name for name in shapes if name.endswith("_proj.weight")}
    for name, (codes, scale) in read.items():
        expected_codes, expected_scale = ternary_matrix(name, source.read(name), groups=1)
        assert torch.equal(codes, expected_codes), name
        assert torch.equal(scale, expected_scale), name

    reader = GgufReader(file)
    tensors = {export_name(tensor.name): tensor for tensor in reader.tensors}
    assert {name: tuple(reversed(t.shape.tolist())) for name, t in tensors.items()} == shapes
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}
    for name in set(shapes) - set(read):
        kept = torch.float16 if name == "model.embed_tokens.weight" else torch.float32
        assert torch.equal(torch.from_numpy(tensors[name].data.copy()), source.read(name).to(kept)), name
    fields = {
        "general.architecture": "bitnet-b1.58",
        "general.file_type": 40,
        "bitnet-b1.58.attention.head_count_kv": 4,
        "bitnet-b1.58.feed_forward_length": 640,
        "bitnet-b1.58.rope.dimension_count": 32,
        "bitnet-b1.58.hidden_activation": "relu2",
    }
    assert {key: reader.get_field(key).contents() for key in fields} == fields


def test_the_gguf_package_does_not_read_it(bitnet_model, tmp_path):
    """If this fails, ``GgufReader`` has nothing left to do."""
    write_gguf(bitnet_model, tmp_path / "model.gguf", "i2_s", ByteTokenizer())
    with pytest.raises(ValueError, match=str(I2_S)):
        gguf.GGUFReader(tmp_path / "model.gguf")


def test_tensors_lie_where_the_table_says(bitnet_model, tmp_path):
    """Each one begins where the padded one before it ends, as a loader that computes offsets itself expects."""
    file = tmp_path / "model.gguf"
    write_gguf(bitnet_model, file, "i2_s", ByteTokenizer())
    tensors = sorted(GgufReader(file).tensors, key=lambda tensor: tensor.data_offset)
    ends = np.array([tensor.data_offset + tensor.n_bytes for tensor in tensors])
    padded = (ends + 31) // 32 * 32
    assert [tensor.data_offset for tensor in tensors[1:]] == padded[:-1].tolist()
    assert file.stat().st_size == padded[-1]


def test_values_that_cannot_be_written_are_named(bitnet_model, tmp_path):
    bitnet_model.weights["decoder.layers.mlp.linear_fc2.weight"][1, 5] = float("nan")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj"):
        write_gguf(bitnet_model, tmp_path / "model.gguf", "i2_s", ByteTokenizer())
