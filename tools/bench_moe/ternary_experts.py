"""bitmoe's routed experts as a layer runs them: quantize, copy rows, both linears, combine; and the backward of all."""

from collections.abc import Callable
from dataclasses import replace

import torch
from moe_inputs import Inputs

from bitmoe.config.choices import BackwardFormat, Recompute
from bitmoe.config.compose import compose
from bitmoe.config.schema import Config, ModelConfig, MoEConfig, QuantConfig
from bitmoe.layers.context import LayerContext
from bitmoe.layers.experts import RoutedExperts
from bitmoe.layers.local_dispatch import LocalDispatch
from bitmoe.parallel.process_groups import Groups
from bitmoe.quant.policy import QuantPolicy

# Shapes: T = tokens, E = experts, H = hidden, F = inner features.

EPS = ModelConfig.norm_eps
LEAVES = ("x", "probs", "w1", "w2", "gain")
"""What gradients are computed for, in order."""


def ternary_pass(
    inputs: Inputs, groups: Groups, backward: BackwardFormat, num_groups: int
) -> Callable[[], tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
    """A pass: the output [T, H] and the gradients of LEAVES; weights are ternarized anew in each.

    Args:
        inputs: the problem; the module's parameters share the memory of its weights.
        groups: process groups of a single rank.
        backward: quant.backward.
        num_groups: quant.groups.
    """
    experts, policy = _experts(inputs, groups, backward, num_groups)
    x_TH, probs_TE = (tensor.detach().requires_grad_() for tensor in (inputs.x_TH, inputs.probs_TE))
    leaves = (x_TH, probs_TE, experts.fc1_weight, experts.fc2_weight, experts.sub_norm_weight)

    def run() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        policy.parameters_changed()
        dispatch = LocalDispatch(inputs.routing_map_TE, inputs.layer.top_k)
        y_TH = experts(x_TH, dispatch, probs_TE)
        return y_TH.detach(), torch.autograd.grad(y_TH, leaves, inputs.dy_TH)

    return run


def _experts(
    inputs: Inputs, groups: Groups, backward: BackwardFormat, num_groups: int
) -> tuple[RoutedExperts, QuantPolicy]:
    """The module with the weights of ``inputs``, in the last stage of a4.8."""
    layer = inputs.layer
    stage = replace(compose(["quant=a48"]).quant.stages[-1], start=0.0)
    config = Config(
        model=ModelConfig(hidden_size=layer.hidden_size),
        moe=MoEConfig(num_experts=layer.num_experts, router_topk=layer.top_k, ffn_hidden_size=layer.ffn_size),
        quant=QuantConfig(groups=num_groups, backward=backward, stages=[stage]),
    )
    policy = QuantPolicy(config.quant)
    context = LayerContext(
        model=config.model,
        moe=config.moe,
        policy=policy,
        groups=groups,
        sequence_parallel=False,
        recompute=Recompute.none,
        dtype=inputs.x_TH.dtype,
        device=inputs.x_TH.device,
    )
    experts = RoutedExperts(context)
    experts.fc1_weight.data = inputs.w1_E2FH
    experts.fc2_weight.data = inputs.w2_EHF
    experts.sub_norm_weight.data = inputs.gain_EF
    return experts, policy
