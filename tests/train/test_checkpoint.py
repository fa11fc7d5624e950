"""A checkpoint continues a run bit by bit in its own layout, and to rounding in any other."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from bitmoe.config.choices import ActFormat, Balancing, Precision, Score
from bitmoe.config.schema import BitStage, Config, MoEConfig, ParallelConfig
from bitmoe.testing.parity import gather_global, make_engine, random_batches, ternary_codes
from bitmoe.train.checkpoint import load_checkpoint, save_checkpoint
from bitmoe.train.fingerprint import fingerprints
from bitmoe.train.manifest import verify
from bitmoe.train.optimizer_state import sharded_optimizer_state, steps_done

A48 = {"qkv": ActFormat.int4, "o_keep": 0.5, "gate_up": ActFormat.int4}


def tiny(precision=Precision.fp32, moe=True, num_layers=4, **layout):
    """A run of 20 steps whose bit stage changes after the 10th."""
    config = Config(parallel=ParallelConfig(**layout))
    config.model.vocab_size, config.model.hidden_size, config.model.num_layers = 100, 32, num_layers
    config.model.num_attention_heads, config.model.num_query_groups = 4, 2
    config.model.ffn_hidden_size, config.context.seq_length = 64, 16
    config.run.micro_batch_size, config.run.global_batch_size, config.run.steps = 2, 8, 20
    config.run.precision, config.optim.warmup_steps = precision, 4
    config.quant.groups = 2
    config.quant.stages = [BitStage(0.0), BitStage(0.5, **A48)]
    if moe:
        config.moe = MoEConfig(num_experts=4, ffn_hidden_size=32, shared_expert_size=32)
        config.moe.score, config.moe.balancing, config.moe.expert_bias = Score.sigmoid, Balancing.none, True
    return config


def with_overlap(config):
    config.engine.overlap_grad_reduce = config.engine.overlap_param_gather = True
    return config


def train(engine, first, last):
    """Losses of these steps, exactly."""
    steps = range(first, last + 1)
    return [engine.train_step(step, random_batches(engine.config, step)).loss.hex() for step in steps]


def everything(engine):
    """Fingerprints of parameters, buffers, fp32 weights and moments, with the step count."""
    engine.gather_parameters()
    model = engine.sharded_state()
    state = {"model": model, "optimizer": sharded_optimizer_state(engine.optimizer, model, is_loading=False)}
    shards = [shard for shard in nested_values(state) if isinstance(shard, ShardedTensor)]
    return fingerprints(dict(enumerate(shards))) | {"steps": steps_done(engine.optimizer)}


def other_start(config):
    """The same run from other initial values, so that whatever is not loaded shows."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, seed=99))


STATE = {"step": 10, "tokens": 1280}


def go_through(config):
    engine = make_engine(config)
    return train(engine, 1, 20)[10:], everything(engine)


def save_and_go_on(config, folder):
    engine = make_engine(config)
    train(engine, 1, 10)
    path = save_checkpoint(folder, engine, STATE, keep=2)
    engine.gather_parameters()
    assert verify(path)["fingerprints"] == fingerprints(engine.sharded_state())
    return train(engine, 11, 20), everything(engine)


def resume(config, folder):
    engine = make_engine(other_start(config))
    # A load must replace all that other steps have left: moments, step counts, ternary codes.
    train(engine, 1, 3)
    engine.evaluate(random_batches(config, 4))
    assert load_checkpoint(folder / "step_00000010", engine) == STATE
    return train(engine, 11, 20), everything(engine)


@pytest.mark.parametrize(
    ("world_size", "config"),
    [
        pytest.param(1, tiny(Precision.bf16, num_layers=2), id="bf16"),
        pytest.param(2, tiny(num_layers=2, tensor=2, expert=2, sequence=True), id="TP2-EP2"),
        pytest.param(2, tiny(pipeline=2, virtual_pipeline=2), id="PP2-VPP2"),
        pytest.param(2, with_overlap(tiny(num_layers=2)), id="DP2-overlap"),
    ],
)
def test_load_checkpoint_continues_bit_by_bit(ranks, tmp_path, world_size, config):
    uninterrupted = ranks(world_size).run(go_through, config)
    assert ranks(world_size).run(save_and_go_on, config, tmp_path) == uninterrupted
    assert ranks(world_size).run(resume, config, tmp_path) == uninterrupted


def observe(engine):
    """What a checkpoint must carry to another layout: tensors, codes and the next loss."""
    prints = fingerprints(engine.sharded_state())
    engine.set_stage(11)
    codes = gather_global(ternary_codes(engine))
    return prints, codes, float.fromhex(train(engine, 11, 11)[0])


def save_and_observe(config, folder):
    engine = make_engine(config)
    train(engine, 1, 3)
    save_checkpoint(folder, engine, {"step": 3}, keep=2)
    return observe(engine)


def load_and_observe(config, folder):
    engine = make_engine(other_start(config))
    load_checkpoint(folder / "step_00000003", engine)
    return observe(engine)


LAYOUTS = {
    "one": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"tensor": 2, "sequence": True}),
    "EP2": (2, {"expert": 2}),
    "PP2": (2, {"pipeline": 2}),
    "PP2-VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "TP2-EP2": (2, {"tensor": 2, "expert": 2, "sequence": True}),
}


@pytest.mark.parametrize(
    ("source", "targets"),
    [
        ("one", ["TP2", "PP2-VPP2"]),
        ("EP2", ["one", "DP2"]),
        ("PP2", ["one"]),
        ("PP2-VPP2", ["EP2"]),
        ("TP2-EP2", ["one", "PP2"]),
    ],
)
def test_load_checkpoint_in_another_layout(ranks, tmp_path, source, targets):
    world_size, layout = LAYOUTS[source]
    prints, codes, loss = ranks(world_size).run(save_and_observe, tiny(**layout), tmp_path)[0]
    assert len(codes) == 6
    for target in targets:
        world_size, layout = LAYOUTS[target]
        found = ranks(world_size).run(load_and_observe, tiny(**layout), tmp_path)[0]
        assert found[0] == prints
        flipped = {name: int((found[1][name] != codes[name]).sum()) for name in codes}
        assert flipped == dict.fromkeys(codes, 0)
        assert found[2] == pytest.approx(loss, rel=1e-6)


def save_then_draw(config, folder):
    save_checkpoint(folder, make_engine(config), {"step": 0}, keep=2)
    return torch.rand(3).tolist()


def load_then_draw(config, folder):
    engine = make_engine(config)
    torch.manual_seed(dist.get_rank())
    load_checkpoint(folder / "step_00000000", engine)
    return torch.rand(3).tolist(), steps_done(engine.optimizer)


def test_load_checkpoint_restores_generators_and_a_first_step_not_taken(ranks, tmp_path):
    drawn = ranks(2).run(save_then_draw, tiny(moe=False), tmp_path)
    assert ranks(2).run(load_then_draw, tiny(moe=False), tmp_path) == [(numbers, 0) for numbers in drawn]
