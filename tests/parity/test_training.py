"""Ways of training that must not change the function, and options that must run: on the first steps of tiny models."""

import os
from dataclasses import replace
from functools import partial

import pytest
import torch

from bitmoe.config.choices import ActFormat, BackwardFormat, Balancing, Precision, Recompute
from bitmoe.config.schema import (
    BitStage,
    Config,
    ContextConfig,
    EngineConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    QuantConfig,
    RunConfig,
)
from bitmoe.quant.ternary_codes import CodeCache
from bitmoe.testing.parity import first_step, loss_curve, make_engine, random_batches
from bitmoe.train import engine

EXPERTS = MoEConfig(num_experts=4, ffn_hidden_size=64, shared_expert_size=64)
CONFIG = Config(
    model=ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=128, vocab_size=100),
    quant=QuantConfig(groups=4, stages=[BitStage(qkv=ActFormat.int4, o_keep=0.5, gate_up=ActFormat.int4)]),
    context=ContextConfig(seq_length=32),
    optim=OptimConfig(warmup_steps=4),
    run=RunConfig(steps=20, micro_batch_size=2, global_batch_size=8, precision=Precision.fp32),
)
MODELS = {"dense": CONFIG, "moe": replace(CONFIG, moe=EXPERTS)}
TP2_EP2 = ParallelConfig(tensor=2, sequence=True, expert=2)


def with_run(config, **changes):
    return replace(config, run=replace(config.run, **changes))


def with_moe(**changes):
    return replace(CONFIG, moe=replace(EXPERTS, **changes))


def grad_distances(step, wanted):
    assert step["grads"].keys() == wanted["grads"].keys()
    pairs = {name: (step["grads"][name], grad) for name, grad in wanted["grads"].items()}
    return {name: ((got - grad).norm() / grad.norm()).item() for name, (got, grad) in pairs.items()}


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.ffn, Recompute.full])
@pytest.mark.parametrize("model", MODELS)
def test_recompute_gives_the_same_bits(model, recompute, ranks):
    [wanted] = ranks(1).run(first_step, MODELS[model])
    [step] = ranks(1).run(first_step, with_run(MODELS[model], recompute=recompute))
    assert step["loss"] == wanted["loss"]
    assert set(grad_distances(step, wanted).values()) == {0.0}


@pytest.mark.parametrize("recompute", [Recompute.ffn, Recompute.full])
def test_recompute_over_ranks(ranks, recompute):
    config = replace(MODELS["moe"], parallel=TP2_EP2)
    wanted = ranks(2).run(first_step, config)[0]
    step = ranks(2).run(first_step, with_run(config, recompute=recompute))[0]
    assert step["loss"] == wanted["loss"]
    assert set(grad_distances(step, wanted).values()) == {0.0}


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_overlapped_communication(model, gather, ranks):
    """Data-parallel ranks that reduce behind the backward pass, and gather behind the forward pass."""
    config = MODELS[model]
    overlapped = replace(config, engine=EngineConfig(overlap_grad_reduce=True, overlap_param_gather=gather))
    [wanted], step = ranks(1).run(first_step, config), ranks(2).run(first_step, overlapped)[0]
    assert step["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert step["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    assert max(grad_distances(step, wanted).values()) < 1e-5
    # Codes made of parameters not gathered yet would show from the second step on.
    assert ranks(2).run(loss_curve, overlapped, 4)[0] == ranks(2).run(loss_curve, config, 4)[0]


def loss_curve_of_small_buckets(config, steps):
    """The same where DDP gathers parameters one by one, so that none arrives with another."""
    original = engine.DistributedDataParallelConfig
    engine.DistributedDataParallelConfig = partial(original, bucket_size=1)
    try:
        return loss_curve(config, steps)
    finally:
        engine.DistributedDataParallelConfig = original


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_is_gathered_before_it_is_read(model, ranks):
    config = MODELS[model]
    overlapped = replace(config, engine=EngineConfig(overlap_grad_reduce=True, overlap_param_gather=True))
    wanted = ranks(2).run(loss_curve, config, 3)[0]
    # Gradients of other buckets are added in another order.
    assert ranks(2).run(loss_curve_of_small_buckets, overlapped, 3)[0] == pytest.approx(wanted, rel=1e-6)


BALANCED = {
    "aux_loss": with_moe(aux_loss_coeff=0.1),
    "seq_aux_loss": with_moe(balancing=Balancing.seq_aux_loss, aux_loss_coeff=0.1),
    "global_aux_loss": with_moe(balancing=Balancing.global_aux_loss, aux_loss_coeff=0.1),
    "z_loss": with_moe(balancing=Balancing.none, z_loss_coeff=0.1),
}


@pytest.mark.parametrize("name", BALANCED)
def test_balancing_losses(name, ranks):
    """They reach the router's gradient, leave the reported loss alone, and do not depend on the layout."""
    router = "decoder.layers.mlp.router.weight"
    [plain] = ranks(1).run(first_step, with_moe(balancing=Balancing.none))
    [wanted] = ranks(1).run(first_step, BALANCED[name])
    assert wanted["loss"] == plain["loss"]
    assert grad_distances(wanted, plain)[router] > 1e-3
    step = ranks(2).run(first_step, replace(BALANCED[name], parallel=TP2_EP2))[0]
    assert max(grad_distances(step, wanted).values()) < 1e-5


def test_capacity(ranks):
    """A roomy capacity changes nothing, a small one drops tokens, in every layout without a fault."""
    [dropless] = ranks(1).run(first_step, MODELS["moe"])
    [roomy] = ranks(1).run(first_step, with_moe(capacity_factor=4.0))
    assert roomy["loss"] == dropless["loss"]
    assert max(grad_distances(roomy, dropless).values()) < 1e-6
    small = with_moe(capacity_factor=0.5)
    for step in (ranks(1).run(first_step, small)[0], ranks(2).run(first_step, replace(small, parallel=TP2_EP2))[0]):
        assert step["loss"] != dropless["loss"]
        assert step["loss"] == pytest.approx(dropless["loss"], rel=0.05)
        assert all(grad.isfinite().all() for grad in step["grads"].values())
        # Half the copies at most reach an expert.
        fc2 = "decoder.layers.mlp.experts.fc2_weight"
        assert 0 < step["grads"][fc2].norm() < dropless["grads"][fc2].norm()


@pytest.mark.parametrize("model", MODELS)
def test_bf16(model, ranks):
    """In bf16 layouts round differently and codes flip; losses still agree to bf16's precision."""
    config = with_run(MODELS[model], precision=Precision.bf16)
    layout = TP2_EP2 if model == "moe" else ParallelConfig(tensor=2, sequence=True)
    [wanted], step = ranks(1).run(first_step, config), ranks(2).run(first_step, replace(config, parallel=layout))[0]
    assert step["loss"] == pytest.approx(wanted["loss"], rel=2e-3)
    assert step["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=5e-2)
    assert all(torch.equal(step["codes"][name], codes) for name, codes in wanted["codes"].items())
    assert all(grad.isfinite().all() for grad in step["grads"].values())


def with_quant(config, **changes):
    return replace(config, quant=replace(config.quant, **changes))


def with_8bit_backward(config):
    return with_quant(config, backward=BackwardFormat["8bit"])


def cosines(step, wanted):
    return {
        name: torch.cosine_similarity(step["grads"][name].flatten(), grad.flatten(), 0).item()
        for name, grad in wanted["grads"].items()
    }


TP2_SP, EP2 = ParallelConfig(tensor=2, sequence=True), ParallelConfig(expert=2)
# Name: model, groups, ranks, layout.
CASES_8BIT = {
    "dense": ("dense", 4, 1, ParallelConfig()),
    "dense TP2 SP": ("dense", 4, 2, TP2_SP),
    "dense TP2 SP G=1": ("dense", 1, 2, TP2_SP),
    "moe": ("moe", 4, 1, ParallelConfig()),
    "moe TP2 SP EP2": ("moe", 4, 2, TP2_EP2),
    "moe ETP2 G=1": ("moe", 1, 2, ParallelConfig(expert_tensor=2)),
}


@pytest.mark.parametrize("case", CASES_8BIT)
def test_8bit_backward(case, ranks):
    """The same loss; in every layout gradients that differ from the exact ones by what rounding to 8 bits adds.

    A rank rounds the gradient of its own outputs, so where tensor parallelism splits them, layouts round differently;
    the embedding's gradient has passed through the roundings of all layers.
    """
    model, groups, world_size, parallel = CASES_8BIT[case]
    exact = with_quant(MODELS[model], groups=groups)
    config = replace(with_8bit_backward(exact), parallel=parallel)
    [wanted], step = ranks(1).run(first_step, exact), ranks(world_size).run(first_step, config)[0]
    assert step["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert step["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=5e-3)
    assert min(cosines(step, wanted).values()) > 0.998
    distances = grad_distances(step, wanted)
    assert max(distances.values()) < 0.06
    assert distances["embedding.word_embeddings.weight"] > 1e-3


def test_8bit_backward_where_outputs_stay_whole(ranks):
    """Data-parallel ranks round as one rank does; experts' blocks of tokens are then those of two ranks' tokens."""
    config = with_8bit_backward(MODELS["moe"])
    [wanted] = ranks(1).run(first_step, config)
    dp2, ep2 = (ranks(2).run(first_step, replace(config, parallel=p))[0] for p in (ParallelConfig(), EP2))
    assert max(grad_distances(dp2, wanted).values()) < 1e-5
    assert min(cosines(ep2, wanted).values()) > 0.999


@pytest.mark.parametrize("model", MODELS)
def test_8bit_backward_trains_alike(model, ranks):
    """Twenty steps stay within 0.02 nats of those with the exact backward."""
    curves = [ranks(1).run(loss_curve, config, 20)[0] for config in (MODELS[model], with_8bit_backward(MODELS[model]))]
    assert curves[1] != curves[0]
    assert curves[1] == pytest.approx(curves[0], abs=0.02)


def times_codes_are_made(config):
    """How often the codes of each weight were made: after a step's gradients, after the step, after its evaluation."""
    engine, made = make_engine(config), []
    caches = [
        v for chunk in engine.models for m in chunk.modules() for v in vars(m).values() if isinstance(v, CodeCache)
    ]
    for index, cache in enumerate(caches):

        def make(index=index, make=cache._make):
            made.append(index)
            return make()

        cache._make = make
    batches, counts = random_batches(config, 1), []
    for action in (engine.compute_gradients, lambda b: engine.train_step(1, b), engine.evaluate, engine.evaluate):
        action(batches)
        counts.append({made.count(index) for index in range(len(caches))})
    return engine.num_micro_batches, len(caches), counts


@pytest.mark.parametrize(("model", "num_weights"), [("dense", 8), ("moe", 12)])
def test_codes_are_made_once_per_step(model, num_weights, ranks):
    [(num_micro_batches, num_caches, counts)] = ranks(1).run(times_codes_are_made, MODELS[model])
    assert num_micro_batches == 4
    assert num_caches == num_weights
    assert counts == [{1}, {1}, {2}, {2}]


def threads_after_a_step():
    first_step(CONFIG)
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
def test_models_of_former_calls_are_freed(ranks):
    """A model left behind would keep its process groups: some fifty threads that wake a hundred times a second."""
    [first], _, [third] = (ranks(1).run(threads_after_a_step) for _ in range(3))
    assert third - first < 25
