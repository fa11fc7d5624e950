"""Our optimizer step against megatron-core's own on the same gradients; and fused Adam against unfused."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from bitmoe.config.choices import Precision
from bitmoe.config.schema import Config, ContextConfig, ModelConfig, MoEConfig, ParallelConfig, QuantConfig, RunConfig
from bitmoe.testing.parity import make_engine, random_batches
from bitmoe.train.optimizer_step import optimizer_step, use_fused_adam

DENSE = Config(
    model=ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=128, vocab_size=100),
    quant=QuantConfig(groups=4),
    context=ContextConfig(seq_length=16),
    run=RunConfig(micro_batch_size=2, global_batch_size=4, precision=Precision.fp32),
)
MOE = replace(DENSE, moe=MoEConfig(num_experts=4, ffn_hidden_size=64, shared_expert_size=64))
# Ranks, and the run on them.
RUNS = {
    "dense": (1, DENSE),
    "moe bf16": (1, replace(MOE, run=replace(MOE.run, precision=Precision.bf16))),
    "dense DP2": (2, DENSE),
    "dense TP2 SP": (2, replace(DENSE, parallel=ParallelConfig(tensor=2, sequence=True))),
    "moe TP2 SP EP2": (2, replace(MOE, parallel=ParallelConfig(tensor=2, sequence=True, expert=2))),
}
CLIPS = {"active": 0.01, "inactive": 1e6, "none": 0.0}


def fp32_state(engine):
    """Parameters, master weights and Adam's moments on this rank; moments tell how gradients were clipped."""
    found = [p.detach() for chunk in engine.models for p in chunk.parameters()]
    for adam in (part.optimizer for part in engine.optimizer.chained_optimizers):
        masters = [p for group in adam.param_groups for p in group["params"]]
        moments = [adam.state[p][name] for p in masters if p in adam.state for name in ("exp_avg", "exp_avg_sq")]
        found += [*masters, *moments]
    return [tensor.detach().double().cpu() for tensor in found if tensor.dtype == torch.float32]


def megatron_step(engine):
    return engine.optimizer.step()[1]


def unfused_step(engine):
    for group in engine.optimizer.param_groups:
        group["fused"] = False
    return optimizer_step(engine.optimizer, engine.config.optim.clip_grad)


def fused_step(engine):
    use_fused_adam(engine.optimizer)
    return optimizer_step(engine.optimizer, engine.config.optim.clip_grad)


def run_steps(config, *steps):
    """For each way to step: the gradient norms of two steps on the same gradients, and the state after them."""
    results = []
    for step in steps:
        engine = make_engine(config)
        engine.compute_gradients(random_batches(config, 1))
        results.append(([float(step(engine)) for _ in range(2)], fp32_state(engine)))
    return results


def assert_equal(got, wanted, tolerance=1e-6):
    (norms, tensors), (wanted_norms, wanted_tensors) = got, wanted
    assert norms == pytest.approx(wanted_norms, rel=tolerance)
    for tensor, exact in zip(tensors, wanted_tensors, strict=True):
        assert (tensor - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", RUNS)
def test_equals_megatron_core(name, clip, ranks):
    world_size, config = RUNS[name]
    config = replace(config, optim=replace(config.optim, clip_grad=CLIPS[clip]))
    for wanted, unfused, fused in ranks(world_size).run(run_steps, config, megatron_step, unfused_step, fused_step):
        assert_equal(unfused, wanted)
        assert_equal(fused, wanted)
        # Clipping leaves the gradients clipped, where there is any.
        assert wanted[0] == pytest.approx(
            [wanted[0][0], CLIPS["active"] if clip == "active" else wanted[0][0]], rel=2e-4
        )


def steps_without_expert_gradients_of_ones_own(config):
    """Steps where this rank holds copies of the experts' gradients that other ranks count."""
    engine = make_engine(config)
    engine.compute_gradients(random_batches(config, 1))
    norms = [optimizer_step(engine.optimizer, 0.0).item()]
    experts = engine.optimizer.chained_optimizers[1]
    for parameter in experts.get_parameters():
        parameter.shared = True
    norms += [optimizer_step(engine.optimizer, 0.0).item(), float(engine.optimizer.step()[1])]
    return norms


def test_part_without_gradients_to_count(ranks):
    [(whole, rest, wanted)] = ranks(1).run(steps_without_expert_gradients_of_ones_own, MOE)
    assert rest < whole
    assert rest == pytest.approx(wanted, rel=1e-6)


@pytest.fixture
def one_gpu(tmp_path, monkeypatch):
    """A process group of this process alone; the pools of ranks have no GPU."""
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "BITMOE_RENDEZVOUS": f"file://{tmp_path}/rendezvous"}.items():
        monkeypatch.setenv(key, value)
    yield
    dist.destroy_process_group()


def given_gradients(step):
    """A step on gradients that do not depend on the order of the GPU's additions."""

    def run(engine):
        generator = torch.Generator().manual_seed(0)
        for parameter in (p for chunk in engine.models for p in chunk.parameters()):
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        return step(engine)

    return run


@pytest.mark.gpu
# megatron-core warns; here, unlike on ranks, warnings are errors.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("clip", ["active", "none"])
def test_fused_adam_on_a_gpu(clip, one_gpu):
    config = replace(MOE, optim=replace(MOE.optim, clip_grad=CLIPS[clip]))
    unfused, fused = run_steps(config, given_gradients(unfused_step), given_gradients(fused_step))
    assert_equal(fused, unfused)
