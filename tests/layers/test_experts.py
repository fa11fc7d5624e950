"""Routed experts: one that gets no token, and experts that must not share a scale."""

import pytest
import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from bitmoe.config.choices import ActFormat, BackwardFormat, Precision, Recompute, Wire
from bitmoe.config.schema import BitStage, Config, ModelConfig, MoEConfig, QuantConfig, RunConfig
from bitmoe.layers.context import LayerContext
from bitmoe.layers.dispatch import Dispatch
from bitmoe.layers.experts import RoutedExperts
from bitmoe.layers.local_dispatch import LocalDispatch
from bitmoe.layers.wire import CodeWire
from bitmoe.model.transformer_config import make_transformer_config
from bitmoe.parallel.process_groups import make_groups, start
from bitmoe.quant.policy import QuantPolicy

# Shapes: T = tokens, E = experts, H = hidden, F = inner features.

TOKENS, EXPERTS, HIDDEN, INNER = 6, 4, 16, 32


def run_experts(chosen, weight_factor=1.0, groups=2, backward=BackwardFormat.bf16, local=False):
    """Send every token to the two ``chosen`` experts; expert 1's weights are multiplied by ``weight_factor``."""
    config = Config(
        model=ModelConfig(hidden_size=HIDDEN, num_attention_heads=2, vocab_size=10),
        moe=MoEConfig(num_experts=EXPERTS, ffn_hidden_size=INNER),
        quant=QuantConfig(groups=groups, backward=backward, stages=[BitStage(gate_up=ActFormat.int4)]),
        run=RunConfig(precision=Precision.fp32),
    )
    start()
    process_groups = make_groups(config.parallel)
    context = LayerContext(
        model=config.model,
        moe=config.moe,
        policy=QuantPolicy(config.quant),
        groups=process_groups,
        sequence_parallel=False,
        recompute=Recompute.none,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    experts, generator = RoutedExperts(context), torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        parameter.data[1] *= weight_factor
    dispatcher = MoEAlltoAllTokenDispatcher(
        EXPERTS, list(range(EXPERTS)), config=make_transformer_config(config), pg_collection=process_groups.mcore
    )
    routing_map_TE = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    routing_map_TE[:, chosen] = True
    wire = CodeWire(Wire.codes, ActFormat.int4)
    dispatch = LocalDispatch(routing_map_TE, 2) if local else Dispatch(dispatcher, routing_map_TE, wire)
    x_TH = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    y_TH = experts(x_TH, dispatch, routing_map_TE.float())
    y_TH.backward(torch.randn(y_TH.shape, generator=generator))
    grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return y_TH.detach(), x_TH.grad, grads


def test_expert_without_tokens(ranks):
    [(y_TH, grad_TH, grads)] = ranks(1).run(run_experts, [0, 3])
    assert y_TH.isfinite().all()
    assert grad_TH.isfinite().all()
    for name, grad in grads.items():
        assert not grad[1:3].any(), name
        assert grad[0].any(), name
        assert grad[3].any(), name


@pytest.mark.parametrize("factor", [0.125, 1000.0])
def test_experts_share_no_scale(factor, ranks):
    """Another expert's weights do not change what this one computes, though all are ternarized together."""
    [(y_TH, grad_TH, _)] = ranks(1).run(run_experts, [0, 2])
    [(y_other_TH, grad_other_TH, _)] = ranks(1).run(run_experts, [0, 2], factor)
    assert torch.equal(y_TH, y_other_TH)
    assert torch.equal(grad_TH, grad_other_TH)


@pytest.mark.parametrize("local", [False, True], ids=["all-to-all", "local"])
@pytest.mark.parametrize("groups", [1, 4])
def test_backward_8bit(groups, local, ranks):
    """The same forward; every gradient close to that of the other backward, and zero for experts without tokens."""
    results = [
        ranks(1).run(run_experts, [0, 3], 1.0, groups, backward, local)[0]
        for backward in (BackwardFormat.bf16, BackwardFormat["8bit"])
    ]
    (wanted_TH, wanted_grad_TH, wanted), (y_TH, grad_TH, grads) = results
    assert torch.equal(y_TH, wanted_TH)
    for name, exact in {**wanted, "x": wanted_grad_TH}.items():
        grad = {**grads, "x": grad_TH}[name]
        assert torch.cosine_similarity(grad.flatten(), exact.flatten(), 0) > 0.999, name
        # Codes are INT8 on CPU: with groups, the gradient of fc2's weight rounds nothing. All others are rounded.
        error = (grad - exact).norm() / exact.norm()
        assert error == 0 if name == "fc2_weight" and groups > 1 else 1e-4 < error < 0.06, name
    assert all(not grad[1:3].any() for grad in grads.values())
