"""Exported names against the checkpoint of a real engine, and fuse against split."""

import pytest
import torch

from bitmoe.config.compose import compose
from bitmoe.model.export_names import Fusion, export_shapes, fuse, slots, split
from bitmoe.model.sizes import with_vocab_size

CASES = {
    "moe": [],
    "dense": ["moe=none"],
    "tied": ["moe=none", "model.tie_embeddings=true"],
    "plain": ["moe=none", "model.sub_norm=false", "model.activation=swiglu"],
    "bias": ["moe.score=sigmoid", "moe.expert_bias=true", "moe.shared_expert_size=0"],
    "wide heads": ["model.head_dim=48", "model.num_query_groups=1"],
}


def config_of(case):
    return with_vocab_size(compose(CASES[case]))


@pytest.mark.parametrize("case", CASES)
def test_fuse_undoes_split(case):
    config = config_of(case)
    for slot in slots(config):
        fused = torch.randn(slot.shape)
        if slot.fusion is Fusion.vocabulary:
            fused[config.model.vocab_size :] = 0
        parts = split(slot, fused, config)
        assert tuple(parts) == slot.names
        assert torch.equal(fuse(slot, parts, config), fused)


def test_qkv_are_interleaved_by_key_value_head():
    config = config_of("moe")
    width = config.model.hidden_size // config.model.num_attention_heads
    slot = next(slot for slot in slots(config) if slot.fusion is Fusion.qkv)
    rows = torch.arange(slot.shape[0]).unsqueeze(1).expand(slot.shape)
    q, k, v = (part[:, 0] for part in split(slot, rows, config).values())
    # Four query heads, two key/value heads: q q k v, q q k v.
    assert q.tolist() == [*range(2 * width), *range(4 * width, 6 * width)]
    assert k.tolist() == [*range(2 * width, 3 * width), *range(6 * width, 7 * width)]
    assert v.tolist() == [*range(3 * width, 4 * width), *range(7 * width, 8 * width)]


def test_one_expert_splits_as_all_do():
    config = config_of("moe")
    slot = next(slot for slot in slots(config) if slot.key.endswith("experts.fc1_weight"))
    fused = torch.randn(slot.shape)
    one, all_of_them = split(slot, fused[3], config), split(slot, fused, config)
    for name in slot.names:
        assert torch.equal(one[name], all_of_them[name][3])


def test_shapes_are_those_of_the_format():
    shapes = export_shapes(config_of("moe"))
    assert shapes["model.embed_tokens.weight"] == (259, 128)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (64, 128)
    assert shapes["model.layers.1.mlp.experts.up_proj.weight"] == (8, 128, 128)
    assert shapes["model.layers.0.mlp.shared_expert.down_proj.weight"] == (128, 128)
    assert "lm_head.weight" not in export_shapes(config_of("tied"))


@pytest.mark.parametrize("case", CASES)
def test_slots_are_the_tensors_of_the_engine(ranks, case):
    assert ranks(1).run(engine_shapes, CASES[case])[0] == {
        (slot.key, slot.layer): slot.shape for slot in slots(config_of(case))
    }


def engine_shapes(overrides):
    from bitmoe.testing.parity import make_engine

    shards = make_engine(with_vocab_size(compose([*overrides, "parallel=single"]))).sharded_state().values()
    return {
        (s.key, *(s.global_offset[: s.prepend_axis_num] or (None,))): tuple(s.global_shape[s.prepend_axis_num :])
        for s in shards
    }
