"""Weights of a checkpoint of any layout, read without ranks: the same tensors, and none that was not saved."""

import json
import weakref

import pytest
import torch

from bitmoe.config.choices import ActFormat, Precision, Score
from bitmoe.config.errors import InputError
from bitmoe.config.schema import BitStage, Config, MoEConfig, ParallelConfig
from bitmoe.data.bpe import train_bpe
from bitmoe.data.tokenizer import ByteTokenizer, JsonTokenizer
from bitmoe.model.export_names import export_shapes, fuse, slots
from bitmoe.testing.parity import gather_global, make_engine
from bitmoe.testing.saved_model import reshard_model, save_model
from bitmoe.train.manifest import MANIFEST, read_manifest, write_manifest
from bitmoe.train.sharded_weights import ShardedWeights


def tiny(precision=Precision.fp32, tie=False, **layout):
    config = Config(parallel=ParallelConfig(**layout))
    config.model.vocab_size, config.model.hidden_size, config.model.num_layers = 259, 32, 4
    config.model.num_attention_heads, config.model.num_query_groups = 4, 2
    config.model.tie_embeddings, config.context.seq_length = tie, 16
    config.run.micro_batch_size, config.run.global_batch_size, config.run.steps = 2, 8, 20
    config.run.precision, config.quant.groups = precision, 2
    config.quant.stages = [BitStage(), BitStage(0.5, qkv=ActFormat.int4, o_keep=0.5, gate_up=ActFormat.int4)]
    config.moe = MoEConfig(num_experts=4, ffn_hidden_size=32, shared_expert_size=32, score=Score.sigmoid)
    config.moe.expert_bias = True
    return config


def save_and_gather(config, run):
    """The checkpoint of new weights, and those weights as the ranks held them."""
    path = save_model(config, run, steps=0)
    return path, gather_global([(shard, shard.data) for shard in make_engine(config).sharded_state().values()])


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """A checkpoint that no test changes."""
    return ranks(1).run(save_model, tiny(), tmp_path_factory.mktemp("run"))[0]


@pytest.mark.parametrize(
    ("world_size", "config"),
    [
        pytest.param(1, tiny(Precision.bf16), id="one"),
        pytest.param(2, tiny(tensor=2, sequence=True, tie=True), id="TP2-tied"),
        pytest.param(2, tiny(pipeline=2, virtual_pipeline=2), id="PP2-VPP2"),
        pytest.param(4, tiny(tensor=2, pipeline=2, expert=2, sequence=True), id="TP2-PP2-EP2"),
    ],
)
def test_read_slot_gives_what_ranks_held(ranks, tmp_path, world_size, config):
    path, held = ranks(world_size).run(save_and_gather, config, tmp_path)[0]
    weights = ShardedWeights(path)
    assert weights.config == config
    for slot in slots(config):
        value = weights.read_slot(slot)
        expected = held[slot.key] if slot.layer is None else held[slot.key][slot.layer]
        assert torch.equal(value.double(), expected)
        is_bias = slot.key.endswith("expert_bias")
        assert value.dtype == (torch.float32 if is_bias or config.run.precision is Precision.fp32 else torch.bfloat16)


def test_read_gives_every_exported_tensor(saved):
    weights = ShardedWeights(saved)
    assert {name: tuple(weights.read(name).shape) for name in export_shapes(weights.config)} == export_shapes(
        weights.config
    )
    for slot in slots(weights.config):
        parts = {name: weights.read(name) for name in slot.names}
        fused = fuse(slot, parts, weights.config)
        rows = min(part.shape[0] for part in parts.values()) if "word_emb" in slot.key or "output" in slot.key else None
        assert torch.equal(fused[:rows], weights.read_slot(slot)[:rows])


def test_read_of_one_expert_is_a_part_of_all(saved):
    weights = ShardedWeights(saved)
    name = "model.layers.2.mlp.experts.up_proj.weight"
    everything = weights.read(name).clone()
    assert all(torch.equal(weights.read(name, expert), everything[expert]) for expert in range(4))


def test_one_tensor_is_held_at_a_time(saved):
    weights = ShardedWeights(saved)
    first, second, *_ = slots(weights.config)
    held = weights.read_slot(first)
    assert weights.read_slot(first) is held
    alive = weakref.ref(held)
    del held
    assert alive() is not None
    weights.read_slot(second)
    assert alive() is None


def test_step_and_tokenizer_are_those_saved(saved):
    weights = ShardedWeights(saved)
    assert weights.step == 2
    assert weights.tokenizer.fingerprint == ByteTokenizer.fingerprint


def test_tokenizer_that_was_not_saved_is_refused(ranks, tmp_path):
    config = tiny()
    path = ranks(1).run(save_model, config, tmp_path)[0]
    body = read_manifest(path / MANIFEST)
    body["state"]["config"]["tokenizer"]["kind"] = "bpe"
    (path / "tokenizer_kind.json").unlink()
    rewrite(path, body)
    with pytest.raises(InputError, match="holds no tokenizer"):
        ShardedWeights(path).tokenizer  # noqa: B018
    JsonTokenizer(train_bpe(["some text " * 50], 300)).save(path)
    rewrite(path, body)
    assert ShardedWeights(path).tokenizer.eod_id == 0


def rewrite(path, body):
    """Write the manifest of changed files, as if they had been saved so."""
    (path / MANIFEST).unlink()
    write_manifest(path, {key: value for key, value in body.items() if key not in ("schema", "files", "checksum")})


def test_damage_is_refused(saved, tmp_path, ranks):
    path = ranks(1).run(reshard_model, saved, tiny(), tmp_path)[0]
    data = bytearray((path / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(data)
    with pytest.raises(InputError, match="__0_0.distcp was changed"):
        ShardedWeights(path)


KEY = "decoder.layers.mlp.experts.fc2_weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body["fingerprints"].update({f"{KEY}[1]": "0" * 16}), f"other values of {KEY}\\[1\\]"),
        (lambda body: body["state"]["config"]["moe"].update(num_experts=8), "router.weight.0. as .4, 32., its config"),
        (lambda body: body["state"]["config"]["model"].update(num_layers=5), "has no decoder.layers.*.4."),
        (lambda body: body["state"]["config"]["model"].update(sub_norm="no"), "model.sub_norm"),
        (lambda body: body["state"].pop("config"), "does not say which config"),
    ],
    ids=["other values", "experts", "layers", "type", "no config"],
)
def test_tensors_that_do_not_belong_are_refused(saved, tmp_path, ranks, change, message):
    path = ranks(1).run(reshard_model, saved, tiny(), tmp_path)[0]
    body = json.loads((path / MANIFEST).read_bytes())
    change(body)
    rewrite(path, body)
    with pytest.raises(InputError, match=message):
        read_all(path)


def read_all(path):
    weights = ShardedWeights(path)
    for name in export_shapes(weights.config):
        weights.read(name)
