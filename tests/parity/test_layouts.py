"""Every layout computes the same function: one set of weights, one global batch, compared with the single rank.

Weights come from the seed alone, so the layouts start from the same values without exchanging anything; that they do
is the first thing compared. Copies of a tensor on different ranks are compared bit by bit while tensors are gathered.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from bitmoe.config.choices import ActFormat, Precision, Score
from bitmoe.config.schema import (
    BitStage,
    Config,
    ContextConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    QuantConfig,
    RunConfig,
)
from bitmoe.testing.parity import first_step, loss_curve, make_engine

A48 = BitStage(qkv=ActFormat.int4, o_keep=0.5, gate_up=ActFormat.int4)
EXPERTS = MoEConfig(num_experts=4, ffn_hidden_size=64, shared_expert_size=64)


def make_config(groups=4, moe=None, **model):
    shape = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "vocab_size": 100} | model
    return Config(
        model=ModelConfig(**shape),
        quant=QuantConfig(groups=groups, stages=[A48]),
        moe=moe or MoEConfig(),
        context=ContextConfig(seq_length=32),
        optim=OptimConfig(warmup_steps=4),
        run=RunConfig(steps=20, micro_batch_size=2, global_batch_size=8, precision=Precision.fp32),
    )


MODELS = {
    "dense G=1": make_config(groups=1),
    "dense G=4": make_config(groups=4),
    "moe G=1": make_config(groups=1, moe=EXPERTS),
    "moe G=4": make_config(groups=4, moe=EXPERTS),
    "sigmoid G=4": make_config(groups=4, moe=replace(EXPERTS, score=Score.sigmoid, expert_bias=True)),
    "tied G=4": make_config(groups=4, tie_embeddings=True),
    "grouped queries G=2": make_config(groups=2, num_query_groups=2),
}
DENSE, MOE = ["dense G=1", "dense G=4"], ["moe G=1", "moe G=4"]

# Name: ranks, layout, models it is tried with.
LAYOUTS = {
    "TP2": (2, ParallelConfig(tensor=2), [*DENSE, "tied G=4"]),
    "TP2 SP": (2, ParallelConfig(tensor=2, sequence=True), [*DENSE, *MOE, "grouped queries G=2"]),
    "PP2": (2, ParallelConfig(pipeline=2), [*DENSE, *MOE, "tied G=4"]),
    "PP2 VP2": (2, ParallelConfig(pipeline=2, virtual_pipeline=2), [*DENSE, *MOE]),
    "DP2": (2, ParallelConfig(), [*DENSE, *MOE]),
    "EP2": (2, ParallelConfig(expert=2), MOE),
    "TP2 SP EP2": (2, ParallelConfig(tensor=2, sequence=True, expert=2), [*MOE, "sigmoid G=4"]),
    "ETP2": (2, ParallelConfig(expert_tensor=2), MOE),
    "TP2 SP ETP2": (2, ParallelConfig(tensor=2, sequence=True, expert_tensor=2), MOE),
    "TP2 SP PP2": (4, ParallelConfig(tensor=2, sequence=True, pipeline=2), [*DENSE, *MOE]),
    "EP2 PP2": (4, ParallelConfig(expert=2, pipeline=2), MOE),
}
CASES = [(layout, model) for layout, (_, _, models) in LAYOUTS.items() for model in models]


def laid_out(model, layout):
    """World size and config of a model in a layout."""
    world_size, parallel, _ = LAYOUTS[layout]
    return world_size, replace(MODELS[model], parallel=parallel)


@pytest.fixture(scope="module")
def single_step(ranks):
    """``single_step(model)``: the first step of the single rank."""
    done = {}

    def step(model):
        if model not in done:
            [done[model]] = ranks(1).run(first_step, MODELS[model])
        return done[model]

    return step


def assert_close(got, wanted, tolerance):
    """Tensors of the same names, each within a relative Frobenius distance."""
    assert got.keys() == wanted.keys()
    far = {name: ((got[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted}
    assert {name: distance for name, distance in far.items() if not distance < tolerance} == {}


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_first_step(layout, model, ranks, single_step):
    world_size, config = laid_out(model, layout)
    step, wanted = ranks(world_size).run(first_step, config)[0], single_step(model)
    assert step["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert step["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    assert_close(step["grads"], wanted["grads"], 1e-5)
    for kind in ("weights", "codes"):
        assert step[kind].keys() == wanted[kind].keys()
        assert [name for name in step[kind] if not torch.equal(step[kind][name], wanted[kind][name])] == []
    # A tensor counted twice or not at all by the optimizer would show here, and train with the wrong clipping.
    gathered = sum(grad.square().sum() for grad in step["grads"].values()).sqrt().item()
    assert step["grad_norm"] == pytest.approx(gathered, rel=1e-5)


def elements_counted(config):
    """The square of the optimizer's gradient norm where every gradient is one, and the elements of the whole model."""
    engine = make_engine(config)
    for parameter in (p for chunk in engine.models for p in chunk.parameters()):
        parameter.main_grad.fill_(1.0)
    _, grad_norm, _ = engine.optimizer.step()
    shards = [shard for shard in engine.sharded_state().values() if isinstance(shard.data, torch.nn.Parameter)]
    counted = [None] * dist.get_world_size()
    dist.all_gather_object(counted, {shard.key: math.prod(shard.global_shape) for shard in shards})
    return float(grad_norm) ** 2, sum({name: n for part in counted for name, n in part.items()}.values())


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("TP2", "dense G=4"),
        ("PP2", "tied G=4"),
        ("DP2", "moe G=4"),
        ("TP2 SP EP2", "moe G=4"),
        ("TP2 SP ETP2", "moe G=4"),
        ("EP2 PP2", "moe G=4"),
    ],
)
def test_gradient_norm_counts_every_element_once(layout, model, ranks):
    """Small tensors too: those whose gradients are too small to show in ``test_first_step``."""
    world_size, config = laid_out(model, layout)
    for counted, elements in ranks(world_size).run(elements_counted, config):
        assert counted == pytest.approx(elements, rel=1e-6)


@pytest.mark.parametrize("layout", ["TP2", "TP2 SP", "TP2 SP EP2", "TP2 SP PP2"])
@pytest.mark.parametrize("groups", [1, 4])
def test_deterministic_runs_give_the_same_bits(layout, groups, ranks):
    world_size, parallel, models = LAYOUTS[layout]
    kind = "dense" if f"dense G={groups}" in models else "moe"
    config = MODELS[f"{kind} G={groups}"]
    config = replace(config, run=replace(config.run, deterministic=True))
    [[wanted]] = ranks(1).run(loss_curve, config, 1)
    [loss] = ranks(world_size).run(loss_curve, replace(config, parallel=parallel), 1)[0]
    assert loss.hex() == wanted.hex()


PERTURBATIONS = 8


@pytest.fixture(scope="module")
def single_curve(ranks):
    """``single_curve(model, config)``: losses of a single rank, and the yardstick of ``test_curves``."""
    done = {}

    def curve(model, config):
        if model not in done:
            losses, *perturbed = (
                ranks(1).run(loss_curve, config, 20, seed)[0] for seed in (None, *range(PERTURBATIONS))
            )
            done[model] = losses, max(gap(other, losses) for other in perturbed)
        return done[model]

    return curve


def gap(losses, wanted):
    """Largest relative difference of two curves."""
    return max(abs(loss - other) / other for loss, other in zip(losses, wanted, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_curves(layout, ranks, single_curve):
    """Twenty steps in a layout end no further from the single rank than rounding alone carries a single rank.

    Training amplifies rounding: one code that flips moves the loss by 1e-5 or more at once, and other codes after it.
    So the yardstick is measured: every weight is moved by one unit in the last place and the curve compared with the
    unmoved one. One such run says little (the first flip may come at any step, or not at all: the largest gap of single
    runs spreads over two orders of magnitude), so it is the largest gap at any step over eight of them, in random
    directions. The largest gap of a layout must stay within twice that.
    """
    world_size, parallel, models = LAYOUTS[layout]
    model = "dense G=4" if "dense G=4" in models else "moe G=1"
    config = MODELS[model]
    config = replace(config, run=replace(config.run, global_batch_size=4))
    losses, yardstick = single_curve(model, config)
    assert losses[-1] < losses[0]
    assert 0 < yardstick < 0.01
    assert gap(ranks(world_size).run(loss_curve, replace(config, parallel=parallel), 20)[0], losses) <= 2 * yardstick
