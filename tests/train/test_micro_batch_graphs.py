"""Recorded micro-batches train like those launched kernel by kernel, bit for bit; and which layouts are recorded."""

import math
from dataclasses import replace

import pytest
import torch

from bitmoe.config.compose import compose
from bitmoe.config.schema import EngineConfig
from bitmoe.model.sizes import with_vocab_size
from bitmoe.testing.parity import make_engine, random_batches
from bitmoe.train.micro_batch_graphs import graphs_hold

STEPS = 10
# The bit stage changes at step 5; two micro-batches a step.
COMMON = [
    "parallel=single",
    "context.seq_length=128",
    "run.micro_batch_size=2",
    "run.global_batch_size=4",
    "run.steps=10",
    "run.precision=bf16",
    "quant=a48",
    "quant.stages.1.start=5",
]
MODELS = {
    "dense": ["moe=none", "quant.backward=8bit"],
    "moe": ["quant.backward=8bit"],
    "bf16 backward": ["moe=none"],
    "gate and up recomputed": ["quant.backward=8bit", "run.recompute=ffn"],
    "unquantized": ["quant=none"],
}


@pytest.fixture
def fixed_order():
    """The embedding's gradient is added up in one order; without this two runs may differ in the last bit."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_rank(monkeypatch, tmp_path):
    """This process as the only rank."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "BITMOE_RENDEZVOUS": f"file://{tmp_path}/store"}.items():
        monkeypatch.setenv(name, value)


def train(config, cuda_graph):
    """Losses and gradient norms, and the statistics of every third step."""
    engine = make_engine(replace(config, engine=EngineConfig(cuda_graph=cuda_graph)))
    curve, statistics = [], []
    for step in range(1, STEPS + 1):
        engine.record_statistics(step % 3 == 0)
        result = engine.train_step(step, random_batches(config, step))
        curve.append((result.loss, result.grad_norm))
        if step % 3 == 0:
            statistics.append(engine.collect_statistics())
        if step == 6:
            curve.append(engine.evaluate(random_batches(config, step)))
    return curve, statistics


@pytest.mark.gpu
@pytest.mark.usefixtures("one_rank", "fixed_order")
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_recorded_steps_are_the_same_steps(overrides):
    config = with_vocab_size(compose([*COMMON[: 6 if "quant=none" in overrides else None], *overrides]))
    assert graphs_hold(config)
    curve, statistics = train(config, cuda_graph=True)
    wanted_curve, wanted_statistics = train(config, cuda_graph=False)
    assert curve == wanted_curve
    assert statistics == wanted_statistics


@pytest.mark.gpu
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("override", ["run.precision=fp32", "moe.ffn_hidden_size=132"])
def test_experts_whose_products_wait_train(override):
    (loss, grad_norm), *_ = train(with_vocab_size(compose([*COMMON, override])), cuda_graph=True)[0]
    assert math.isfinite(loss + grad_norm)


@pytest.mark.parametrize(
    "override",
    [
        "parallel.pipeline=2",
        "parallel.expert=2",
        "parallel.expert_tensor=2",
        "run.recompute=full",
        "run.deterministic=true",
        "engine.overlap_grad_reduce=true",
        "engine.cuda_graph=false",
        "moe.capacity_factor=1.0",
        # Experts' products wait for their sizes.
        "run.precision=fp32",
        "moe.ffn_hidden_size=132",
    ],
)
def test_layouts_that_are_not_recorded(override, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not graphs_hold(compose([*COMMON, override]))


@pytest.mark.parametrize(
    "overrides",
    [
        COMMON,
        [*COMMON, "run.recompute=ffn"],
        [*COMMON, "parallel=tp2", "parallel.sequence=true"],
        [*COMMON, "moe=none", "run.precision=fp32", "model.ffn_hidden_size=132"],
    ],
    ids=lambda overrides: " ".join(overrides[len(COMMON) :]),
)
def test_layouts_that_are_recorded(overrides, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert graphs_hold(compose(overrides))


def test_nothing_is_recorded_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not graphs_hold(compose(COMMON))
