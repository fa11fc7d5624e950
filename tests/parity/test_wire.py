"""Packed codes and codes as wide as bf16 train the same model: every loss, gradient and code equal bit for bit."""

from dataclasses import replace

import pytest
import torch

from bitmoe.config.choices import ActFormat, Precision, WeightFormat, Wire
from bitmoe.config.schema import (
    BitStage,
    Config,
    ContextConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    QuantConfig,
    RunConfig,
)
from bitmoe.testing.parity import first_step, loss_curve

NONE = ActFormat.none
STAGES = {
    "a8": BitStage(),
    "a4.8": BitStage(qkv=ActFormat.int4, o_keep=0.5, gate_up=ActFormat.int4),
    "fp4": BitStage(qkv=ActFormat.fp4, o_keep=0.5, gate_up=ActFormat.fp4),
    "none": BitStage(qkv=NONE, o=NONE, gate_up=NONE, down=NONE),
}
EXPERTS = MoEConfig(num_experts=4, ffn_hidden_size=64, shared_expert_size=64)
LAYOUTS = {
    "TP2 SP": (ParallelConfig(tensor=2, sequence=True), MoEConfig()),
    "EP2": (ParallelConfig(expert=2), EXPERTS),
    "TP2 SP EP2": (ParallelConfig(tensor=2, sequence=True, expert=2), EXPERTS),
    "ETP2": (ParallelConfig(expert_tensor=2), EXPERTS),
}
CASES = [(layout, stage, Precision.fp32) for layout in ("TP2 SP", "EP2", "TP2 SP EP2") for stage in STAGES]
CASES += [(layout, "a4.8", Precision.bf16) for layout in ("TP2 SP", "EP2", "TP2 SP EP2")]
CASES += [("ETP2", "a4.8", Precision.fp32)]


def make_config(layout, stage, precision, wire):
    parallel, moe = LAYOUTS[layout]
    weights = WeightFormat.none if stage == "none" else WeightFormat.ternary
    return Config(
        model=ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=128, vocab_size=100),
        quant=QuantConfig(groups=2, weights=weights, stages=[STAGES[stage]]),
        moe=moe,
        parallel=replace(parallel, wire=wire),
        context=ContextConfig(seq_length=32),
        run=RunConfig(steps=20, micro_batch_size=2, global_batch_size=4, precision=precision),
    )


@pytest.mark.parametrize(("layout", "stage", "precision"), CASES)
def test_first_step(layout, stage, precision, ranks):
    packed, wide = (ranks(2).run(first_step, make_config(layout, stage, precision, wire))[0] for wire in Wire)
    assert packed["loss"].hex() == wide["loss"].hex()
    assert packed["grad_norm"] == wide["grad_norm"]
    for kind in ("grads", "weights", "codes"):
        assert packed[kind].keys() == wide[kind].keys()
        assert [name for name in wide[kind] if not torch.equal(packed[kind][name], wide[kind][name])] == []


def switched_curve(config):
    """Three losses of a run that goes from INT8 inputs to 4 bits at its second step."""
    config.quant.stages = [STAGES["a8"], replace(STAGES["a4.8"], start=2.0)]
    return loss_curve(config, 3)


@pytest.mark.parametrize("layout", ["TP2 SP", "TP2 SP EP2"])
def test_bit_stage_changes_on_the_way(layout, ranks):
    curves = [ranks(2).run(switched_curve, make_config(layout, "a8", Precision.bf16, wire))[0] for wire in Wire]
    assert curves[0] == curves[1]
    assert len(set(curves[0])) == 3
