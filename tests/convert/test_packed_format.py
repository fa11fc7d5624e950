"""The packed format: what every layout's checkpoint becomes, in how much memory, and what is noticed of damage."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitmoe.config.choices import ActFormat, Precision, Score, WeightFormat
from bitmoe.config.convert_schema import Packing
from bitmoe.config.errors import InputError
from bitmoe.config.schema import BitStage, Config, MoEConfig, ParallelConfig
from bitmoe.convert.packed_format import packed_bytes, write_packed
from bitmoe.convert.packed_manifest import MANIFEST, verify_packed, write_packed_manifest
from bitmoe.data.tokenizer import ByteTokenizer
from bitmoe.infer import BitmoeConfig
from bitmoe.model.export_names import export_shapes, slots
from bitmoe.testing.saved_model import reshard_model, save_model
from bitmoe.train import fingerprint
from bitmoe.train.sharded_weights import ShardedWeights
from bitmoe_kernels.ternary_pack import unpack
from bitmoe_kernels.weight_quant import ternarize

TWO_BIT = Packing["2bit"]


def tiny(precision=Precision.fp32, **layout):
    config = Config(parallel=ParallelConfig(**layout))
    config.model.vocab_size, config.model.hidden_size, config.model.num_layers = 259, 32, 4
    config.model.num_attention_heads, config.model.num_query_groups = 4, 2
    config.context.seq_length = 16
    config.run.micro_batch_size, config.run.global_batch_size, config.run.steps = 2, 8, 20
    config.run.precision, config.quant.groups = precision, 2
    config.quant.stages = [BitStage(), BitStage(0.5, qkv=ActFormat.int4, o_keep=0.5, gate_up=ActFormat.int4)]
    config.moe = MoEConfig(num_experts=4, ffn_hidden_size=32, shared_expert_size=32, score=Score.sigmoid)
    config.moe.expert_bias = True
    return config


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """A checkpoint of one rank that no test changes."""
    return ranks(1).run(save_model, tiny(), tmp_path_factory.mktemp("run"))[0]


def packed(source, folder, packing=TWO_BIT):
    folder.mkdir()
    write_packed_manifest(folder, write_packed(source, ByteTokenizer(), folder, packing))
    return folder


@pytest.fixture
def model(saved, tmp_path):
    """A packed model that a test may damage."""
    return packed(ShardedWeights(saved), tmp_path / "model")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (2, {"tensor": 2, "sequence": True}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (2, {"expert": 2}),
        (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
        (4, {"tensor": 2, "expert": 2, "expert_tensor": 2, "sequence": True}),
    ],
    ids=lambda value: "-".join(f"{key}{size}" for key, size in value.items()) if isinstance(value, dict) else "",
)
def test_every_layout_gives_the_same_bytes(ranks, saved, tmp_path, world_size, layout):
    path = ranks(world_size).run(reshard_model, saved, tiny(**layout), tmp_path / "run")[0]
    expected = contents(packed(ShardedWeights(saved), tmp_path / "first"))
    assert contents(packed(ShardedWeights(path), tmp_path / "second")) == expected
    assert len(expected) == 12


@pytest.mark.parametrize("packing", Packing)
def test_tensors_hold_the_codes_and_scales_of_the_weights(saved, tmp_path, packing):
    source = ShardedWeights(saved)
    folder = packed(source, tmp_path / "model", packing)
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    stored = {name: tensor for tensors in files for name, tensor in tensors.items()}
    for name, shape in export_shapes(source.config).items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(stored.pop(name), source.read(name))
            continue
        codes, scale = ternarize(
            source.read(name), 2, dim=1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        )
        assert torch.equal(unpack(stored.pop(name), shape[-1], packing.value), codes)
        assert torch.equal(stored.pop(f"{name}_scale"), scale)
    assert not stored
    assert sum(path.stat().st_size for path in folder.iterdir()) < packed_bytes(source.config, packing) + (64 << 10)


def test_config_is_that_of_the_last_stage(model):
    config = BitmoeConfig.from_pretrained(model)
    assert config.input_formats == {"qkv": "int4", "o": "int8", "gate_up": "int4", "down": "int8"}
    assert (config.o_keep, config.quant_groups, config.kv_bits, config.packing) == (0.5, 2, 16, "2bit")
    assert (config.num_experts, config.num_experts_per_tok, config.router_score) == (4, 2, "sigmoid")
    assert (config.router_bias, config.shared_expert_intermediate_size) == (True, 32)
    assert (config.max_position_embeddings, config.eos_token_id, config.pad_token_id) == (16, 256, 258)


def test_model_without_quantization_keeps_its_matrices(ranks, tmp_path):
    config = tiny(Precision.bf16)
    formats = dict.fromkeys(("qkv", "o", "gate_up", "down"), ActFormat.none)
    config.quant = replace(config.quant, weights=WeightFormat.none, stages=[BitStage(**formats)])
    config.moe = MoEConfig()
    source = ShardedWeights(ranks(1).run(save_model, config, tmp_path / "run")[0])
    folder = packed(source, tmp_path / "model")
    stored = load_file(folder / "model-00002-of-00006.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(tensor, source.read(name))
        assert tensor.dtype == torch.bfloat16
    assert BitmoeConfig.from_pretrained(folder).weights == "none"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, by a weak reference to each tensor on them."""

    def __init__(self):
        super().__init__()
        self.users, self.sizes, self.peak = {}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                place = storage.data_ptr()
                self.users[place] = self.users.get(place, 0) + 1
                self.sizes[place] = storage.nbytes()
                weakref.finalize(tensor, self._release, place)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result

    def _release(self, place):
        self.users[place] -= 1
        if not self.users[place]:
            del self.users[place], self.sizes[place]


@pytest.mark.parametrize("precision", Precision)
def test_peak_memory_is_below_twice_the_largest_layer(ranks, tmp_path, monkeypatch, precision):
    config = tiny()
    config.run.precision = precision
    config.model.hidden_size = config.moe.ffn_hidden_size = 256
    source = ShardedWeights(ranks(1).run(save_model, config, tmp_path / "run", 0)[0])
    # Hashing takes a fixed room; it is made small as the model is.
    monkeypatch.setattr(fingerprint, "_CHUNK", 1 << 10)
    width = 2 if precision is Precision.bf16 else 4
    layers = [width * sum(torch.Size(s.shape).numel() for s in slots(config) if s.layer == n) for n in range(4)]
    with LiveBytes() as live:
        packed(source, tmp_path / "model")
    assert max(layers) / 2 < live.peak < 2 * max(layers)


def flip(folder):
    path = folder / "model-00002-of-00006.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    return path.name


def truncate(folder):
    path = folder / "model-00003-of-00006.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return path.name


def remove(folder):
    (folder / "tokenizer.json").unlink()
    return "missing: tokenizer.json"


def add(folder):
    (folder / "modeling.py").write_text("")
    return "not part of it: modeling.py"


def change_manifest(folder):
    body = json.loads((folder / MANIFEST).read_text())
    body["tensors"]["model.norm.weight"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(body))
    return "manifest.json was changed"


def link(folder):
    target = folder.parent / "elsewhere"
    shutil.move(folder / "config.json", target)
    (folder / "config.json").symlink_to(target)
    return "config.json is no regular file"


@pytest.mark.parametrize("damage", [flip, truncate, remove, add, change_manifest, link])
def test_damage_is_named(model, damage):
    verify_packed(model)
    named = damage(model)
    with pytest.raises(InputError, match=named):
        verify_packed(model)


EXPERTS = "model.layers.1.mlp.experts.gate_proj.weight"


def swap_experts(tensors):
    tensors[EXPERTS] = tensors[EXPERTS][[1, 0, 2, 3]]


def exchange_names(tensors):
    other = EXPERTS.replace("gate", "up")
    tensors[EXPERTS], tensors[other] = tensors[other], tensors[EXPERTS]


def leave_out(tensors):
    del tensors[EXPERTS]


@pytest.mark.parametrize("change", [swap_experts, exchange_names, leave_out])
def test_tensors_mixed_up_in_a_file_written_again_are_named(model, change):
    path = model / "model-00003-of-00006.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    seal_again(model)
    with pytest.raises(InputError, match=EXPERTS):
        verify_packed(model)


def test_index_that_leaves_the_folder_is_refused(model):
    index = model / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00006.safetensors", "../x"))
    seal_again(model)
    with pytest.raises(InputError, match="'../x', which is no safetensors file of this folder"):
        verify_packed(model)


def seal_again(folder: Path):
    """Make the manifest fit the files, with the tensors it had."""
    tensors = json.loads((folder / MANIFEST).read_text())["tensors"]
    write_packed_manifest(folder, tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts.down_proj.weight", "model.layers.0.input_layernorm.weight"]
)
def test_weights_that_are_not_finite_are_refused(saved, tmp_path, name, value):
    class Broken(ShardedWeights):
        def read_slot(self, slot, expert=None):
            tensor = super().read_slot(slot, expert)
            return torch.full_like(tensor, value) if name in slot.names else tensor

    with pytest.raises(InputError, match=f"{name} holds NaN or infinity"):
        packed(Broken(saved), tmp_path / "model")
