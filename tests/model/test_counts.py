"""Parameters and FLOPs against the model that is really built, and against published numbers."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bitmoe.config.compose import compose
from bitmoe.model.counts import (
    active_parameters,
    forward_flops,
    layer_weights,
    model_weights,
    total_parameters,
)
from bitmoe.model.gpt import build_language_model
from bitmoe.model.memory import rank_numel, stage_weights
from bitmoe.model.sizes import with_vocab_size
from bitmoe.parallel.process_groups import make_groups, start
from bitmoe.quant.policy import QuantPolicy

SINGLE = ["parallel=single"]
DENSE = ["moe=none", "parallel=single"]


def build(overrides):
    start()
    config = with_vocab_size(compose(overrides))
    groups = make_groups(config.parallel)
    chunks = config.parallel.virtual_pipeline
    stages = range(chunks) if chunks else [None]
    policy = QuantPolicy(config.quant)
    return config, [build_language_model(config, groups, policy, vp_stage=stage) for stage in stages]


def count_parameters(overrides):
    return sum(p.numel() for chunk in build(overrides)[1] for p in chunk.parameters())


@pytest.mark.parametrize(
    "overrides",
    [
        DENSE,
        [*DENSE, "model.tie_embeddings=true"],
        [*DENSE, "model.num_query_groups=4", "model.head_dim=48"],
        [*DENSE, "model.num_query_groups=1", "quant.groups=1", "model.sub_norm=false"],
        SINGLE,
        [*SINGLE, "moe.shared_expert_size=0", "quant=none"],
    ],
    ids=" ".join,
)
def test_total_is_that_of_the_built_model(ranks, overrides):
    config = with_vocab_size(compose(overrides))
    assert ranks(1).run(count_parameters, overrides) == [total_parameters(model_weights(config))]


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel=tp2_ep2"],
        ["parallel=tp2_ep2", "parallel.expert=1", "parallel.expert_tensor=2"],
        ["parallel=pp2", "model.tie_embeddings=true"],
        ["parallel=pp2", "parallel.virtual_pipeline=2", "moe=none", "model.num_layers=4"],
    ],
    ids=" ".join,
)
def test_every_rank_holds_its_part(ranks, overrides):
    config = with_vocab_size(compose(overrides))
    stages = [0, 1] if config.parallel.pipeline == 2 else [0, 0]
    expected = [sum(rank_numel(weight, config) for weight in stage_weights(config, stage)) for stage in stages]
    assert ranks(2).run(count_parameters, overrides) == expected


@pytest.mark.parametrize(
    ("experiment", "billions"),
    [("paper_700m", 0.679), ("paper_1.3b", 1.208), ("paper_3b", 3.222), ("paper_7b", 6.476)],
)
def test_linears_are_the_papers_n(experiment, billions):
    """BitNet a4.8, Table 6, counts the matrices of the layers."""
    config = compose([f"experiment={experiment}"])
    linears = [weight for weight in model_weights(config) if weight.role]
    assert round(total_parameters(linears) / 1e9, 3) == billions


def test_bitnet_2b4t_as_published():
    assert total_parameters(model_weights(compose(["experiment=bitnet_2b4t"]))) == 2_412_820_480


@pytest.mark.parametrize(
    ("experiment", "qkv", "out", "up", "gate", "down", "overall"),
    [
        ("paper_700m", 12.1, 50.0, 66.2, 12.1, 80.9, 42.57),
        ("paper_7b", 12.1, 50.0, 71.4, 12.0, 84.2, 44.50),
    ],
)
def test_roles_weigh_as_in_the_paper(experiment, qkv, out, up, gate, down, overall):
    """BitNet a4.8, Table 2: the overall sparsity is the mean over roles, weighted by parameters."""
    sparsity = {"qkv": qkv, "o": out, "gate_up": (gate + up) / 2, "down": down}
    linears = [weight for weight in layer_weights(compose([f"experiment={experiment}"])) if weight.role]
    mean = sum(sparsity[weight.role] * weight.numel for weight in linears) / total_parameters(linears)
    assert mean == pytest.approx(overall, abs=0.01)


def test_a_token_uses_its_topk_of_the_experts():
    config = with_vocab_size(compose(["moe.num_experts=16", "moe.router_topk=3"]))
    weights = model_weights(config)
    per_expert = 3 * 128 * 128 + 128
    unused = config.model.num_layers * (16 - 3) * per_expert
    assert total_parameters(weights) - active_parameters(weights, config) == unused


def measure_flops(overrides):
    config, (model,) = build(overrides)
    tokens = torch.arange(2 * config.context.seq_length).view(2, -1) % 250
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(tokens, torch.arange(config.context.seq_length).expand_as(tokens), None, labels=tokens)
    counts = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    return counts, tokens.numel()


@pytest.mark.parametrize("overrides", [DENSE, SINGLE], ids=" ".join)
def test_flops_of_linears_are_those_torch_counts(ranks, overrides):
    overrides = [*overrides, "quant=none", "context.seq_length=32"]
    ((counts, tokens),) = ranks(1).run(measure_flops, overrides)
    linears, _ = forward_flops(with_vocab_size(compose(overrides)))
    products = sum(flops for operator, flops in counts.items() if "attention" not in operator)
    assert products == linears * tokens


def test_attention_flops_by_hand():
    """Token t of a sequence has t keys; each costs a multiply-add a feature in each of two products."""
    config = with_vocab_size(compose(["model.head_dim=48"]))
    seq_length, features = config.context.seq_length, config.model.num_attention_heads * 48
    a_sequence = sum(2 * 2 * features * keys for keys in range(1, seq_length + 1))
    assert forward_flops(config)[1] == config.model.num_layers * a_sequence // seq_length
