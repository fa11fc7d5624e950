"""A folder of latent weights gives back what was written into it, and nothing when it was touched."""

import shutil

import pytest
import torch

from bitmoe.config.compose import compose
from bitmoe.config.errors import InputError
from bitmoe.data.tokenizer import ByteTokenizer
from bitmoe.model.export_names import export_shapes, fuse, slots
from bitmoe.model.sizes import with_vocab_size
from bitmoe.train.weight_folder import WeightFolder, is_weight_folder, write_weight_folder

SMALL = ["model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_layers=2", "parallel=single"]
MODELS = {
    "mixture": [*SMALL, "moe.num_experts=4", "moe.ffn_hidden_size=16", "moe.shared_expert_size=24"],
    "dense": [*SMALL, "moe=none", "model.tie_embeddings=true"],
    "bias": [*SMALL, "moe.num_experts=4", "moe.score=sigmoid", "moe.expert_bias=true", "model.sub_norm=false"],
}


class RandomWeights:
    """A source over random tensors by their exported names."""

    def __init__(self, overrides):
        self.config = with_vocab_size(compose(overrides))
        generator = torch.Generator().manual_seed(1)
        shapes = export_shapes(self.config)
        self.tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for name in self.tensors.keys() - {name for name in shapes if name.endswith("expert_bias")}:
            self.tensors[name] = self.tensors[name].bfloat16()

    def read(self, name, expert=None):
        return self.tensors[name] if expert is None else self.tensors[name][expert]

    def read_slot(self, slot, expert=None):
        return fuse(slot, {name: self.read(name, expert) for name in slot.names}, self.config)


@pytest.fixture(params=MODELS)
def source(request):
    return RandomWeights(MODELS[request.param])


def test_what_is_written_is_read(source, tmp_path):
    names = []
    write_weight_folder(source, tmp_path, names.append, ByteTokenizer())
    assert is_weight_folder(tmp_path)
    read = WeightFolder(tmp_path)
    assert names == list(export_shapes(source.config))
    assert read.config == source.config
    assert read.tokenizer.fingerprint == ByteTokenizer.fingerprint
    for name, tensor in source.tensors.items():
        assert torch.equal(read.read(name), tensor)
        assert read.read(name).dtype == tensor.dtype
    for slot in slots(source.config):
        assert torch.equal(read.read_slot(slot), source.read_slot(slot))


def test_one_expert_is_read_alone(tmp_path):
    source = RandomWeights(MODELS["mixture"])
    write_weight_folder(source, tmp_path, lambda name: None)
    read = WeightFolder(tmp_path)
    for slot in slots(source.config):
        if "experts." in slot.key and "shared" not in slot.key:
            assert torch.equal(read.read_slot(slot, 3), source.read_slot(slot, 3))
            assert torch.equal(read.read(slot.names[0], 2), source.read(slot.names[0], 2))


def test_a_file_for_each_layer(tmp_path):
    write_weight_folder(RandomWeights(MODELS["mixture"]), tmp_path, lambda name: None)
    # Embedding, two layers, last norm and head.
    assert len(list(tmp_path.glob("model-*-of-00004.safetensors"))) == 4


def test_files_already_there_belong_to_it(tmp_path):
    (tmp_path / "parity.json").write_text("{}")
    write_weight_folder(RandomWeights(MODELS["dense"]), tmp_path, lambda name: None)
    WeightFolder(tmp_path)


def test_without_a_tokenizer(tmp_path):
    write_weight_folder(RandomWeights(MODELS["dense"]), tmp_path, lambda name: None)
    with pytest.raises(InputError, match="tokenizer_kind.json"):
        _ = WeightFolder(tmp_path).tokenizer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weight_folder(RandomWeights(MODELS["dense"]), folder, lambda name: None)
    return folder


@pytest.mark.parametrize(
    "file", ["config.yaml", "manifest.json", "model.safetensors.index.json", "model-00002-of-00004.safetensors"]
)
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damage_is_refused(written, tmp_path, file, damage):
    folder = shutil.copytree(written, tmp_path / "copy")
    content = bytearray((folder / file).read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        (folder / file).write_bytes(content)
    elif damage == "truncated":
        (folder / file).write_bytes(content[:-1])
    else:
        (folder / file).unlink()
    with pytest.raises(InputError, match=file):
        WeightFolder(folder)


def test_files_swapped_are_refused(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "copy")
    first, second = folder / "model-00002-of-00004.safetensors", folder / "model-00003-of-00004.safetensors"
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    with pytest.raises(InputError, match=r"model-0000\d"):
        WeightFolder(folder)


def test_another_folder_is_no_weight_folder(tmp_path):
    assert not is_weight_folder(tmp_path)
    with pytest.raises(InputError, match=r"manifest.json"):
        WeightFolder(tmp_path)


def test_padding_rows_of_the_vocabulary_are_kept(tmp_path):
    source = RandomWeights([*MODELS["mixture"], "model.vocab_size=100", "model.vocab_multiple=64"])
    embedding = next(slot for slot in slots(source.config) if slot.key.startswith("embedding"))
    padded = torch.randn(embedding.shape)
    fused = source.read_slot
    source.read_slot = lambda slot, expert=None: padded if slot == embedding else fused(slot, expert)
    write_weight_folder(source, tmp_path, lambda name: None)
    read = WeightFolder(tmp_path)
    assert torch.equal(read.read_slot(embedding), padded)
    assert torch.equal(read.read(embedding.names[0]), padded[:100])
