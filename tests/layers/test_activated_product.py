"""Gate and up, their activation and the quantizer of down as one function: what the single steps give."""

import pytest
import torch

from bitmoe.config.choices import ActFormat, Activation, BackwardFormat, Recompute
from bitmoe.config.schema import BitStage, ModelConfig, MoEConfig, ParallelConfig, QuantConfig
from bitmoe.layers import code_product, grouped_code_product
from bitmoe.layers.activation import gated_activation
from bitmoe.layers.context import LayerContext
from bitmoe.layers.experts import RoutedExperts
from bitmoe.layers.feed_forward import FeedForward
from bitmoe.layers.local_dispatch import LocalDispatch
from bitmoe.layers.norm import sub_norm
from bitmoe.layers.quantize_input import quantize_rows
from bitmoe.parallel.process_groups import make_groups, start
from bitmoe.quant.policy import QuantPolicy
from bitmoe.quant.ternary_codes import WeightOperands
from bitmoe_kernels.act_quant import quantize_int4
from bitmoe_kernels.relu2_glu import relu2_glu_quantize, relu2_glu_quantize_backward
from bitmoe_kernels.weight_quant import ternary_operands

# Shapes: T = tokens, H = hidden, F = inner features, E = experts, R = rows sorted by expert.

TOKENS, HIDDEN, INNER, EXPERTS = 12, 16, 32, 4
COUNTS = [37, 0, 1, 90]
EPS = 1e-5

each_backward = pytest.mark.parametrize("backward", list(BackwardFormat), ids=lambda backward: backward.name)
each_groups = pytest.mark.parametrize("groups", [1, 2])
with_or_without_sub_norm = pytest.mark.parametrize("sub_norm", [True, False], ids=["sub-norm", "no sub-norm"])


def make_context(groups, backward, sub_norm, activation=Activation.relu2_glu):
    start()
    stage = BitStage(gate_up=ActFormat.int4)
    return LayerContext(
        model=ModelConfig(hidden_size=HIDDEN, sub_norm=sub_norm, activation=activation),
        moe=MoEConfig(num_experts=EXPERTS, ffn_hidden_size=INNER, router_topk=2),
        policy=QuantPolicy(QuantConfig(groups=groups, backward=backward, stages=[stage])),
        groups=make_groups(ParallelConfig()),
        sequence_parallel=False,
        recompute=Recompute.none,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def randomize(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def run(module, forward, *shape, leaf=None):
    """Output, and gradients of the input, all parameters and the ``leaf``."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    if leaf is not None:
        leaf.requires_grad_()
    y = forward(x)
    leaves = [x, *module.parameters(), *([] if leaf is None else [leaf])]
    return y, torch.autograd.grad(y, leaves, torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))


def assert_same(got, wanted, backward):
    # Where dY is rounded, its last bit in fp32 may send a number to the next code.
    limit = 1e-6 if backward is BackwardFormat.bf16 else 1e-2
    assert torch.equal(got[0], wanted[0])
    for gradient, truth in zip(got[1], wanted[1], strict=True):
        assert (gradient - truth).norm() <= limit * truth.norm()


def check_feed_forward(groups, backward, has_norm):
    module = randomize(FeedForward(INNER, make_context(groups, backward, has_norm)))
    assert module.linear_fc2.whole_down_input() is not None
    wanted = run(module, lambda x: module.linear_fc2(module.linear_fc1(x)), TOKENS, 1, HIDDEN)
    assert_same(run(module, module, TOKENS, 1, HIDDEN), wanted, backward)


def check_experts(groups, backward, has_norm):
    module = randomize(RoutedExperts(make_context(groups, backward, has_norm)))
    routing_map_TE = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    routing_map_TE[:, [0, 3]] = True
    dispatch = LocalDispatch(routing_map_TE, 2)
    probs_TE = routing_map_TE * torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(4))
    got = run(module, lambda x: module(x, dispatch, probs_TE), TOKENS, HIDDEN, leaf=probs_TE)
    module.activation = Activation.swiglu  # Has no function of its own with the product.
    module._normalized = lambda gate_up, dispatch: normalized(module, gate_up, dispatch)
    wanted = run(module, lambda x: module(x, dispatch, probs_TE), TOKENS, HIDDEN, leaf=probs_TE)
    assert_same(got, wanted, backward)
    assert torch.equal(got[1][-1] != 0, routing_map_TE)


def normalized(module, gate_up, dispatch):
    x_RF = gated_activation(Activation.relu2_glu, gate_up)
    if module.sub_norm_weight is None:
        return x_RF
    return sub_norm(x_RF, module.sub_norm_weight[dispatch.expert_R.long()], module.eps, module.num_groups, None)


def swiglu_down_input():
    return FeedForward(
        INNER, make_context(1, BackwardFormat.bf16, True, Activation.swiglu)
    ).linear_fc2.whole_down_input()


def takes_quantized_input():
    module = randomize(FeedForward(INNER, make_context(1, BackwardFormat.bf16, True)))
    x = torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(1))
    return torch.equal(module(x), module(quantize_rows(x, "gate_up", module.linear_fc1.policy)))


@each_groups
@each_backward
@with_or_without_sub_norm
@pytest.mark.parametrize("check", [check_feed_forward, check_experts], ids=["dense", "experts"])
def test_it_gives_what_single_steps_give(ranks, check, groups, backward, sub_norm):
    ranks(1).run(check, groups, backward, sub_norm)


def test_swiglu_is_quantized_by_down(ranks):
    assert ranks(1).run(swiglu_down_input) == [None]


def test_tokens_may_be_quantized_before(ranks):
    assert ranks(1).run(takes_quantized_input) == [True]


@with_or_without_sub_norm
@pytest.mark.parametrize("num_experts", [None, len(COUNTS)], ids=["dense", "experts"])
def test_gradients_of_float8_inputs_agree_with_those_of_unrounded_dy(num_experts, sub_norm):
    """The codes that GPUs have, with the 8-bit backward: one rounding of dY, 2.6 % of its norm."""
    generator = torch.Generator().manual_seed(3)
    num_rows, lead = sum(COUNTS), () if num_experts is None else (num_experts,)
    expert_R = torch.arange(len(COUNTS), dtype=torch.int32).repeat_interleave(torch.tensor(COUNTS))
    ends_E = torch.tensor(COUNTS).cumsum(0).int()
    x_codes, x_scale = quantize_int4(torch.randn(num_rows, HIDDEN, generator=generator), torch.float8_e4m3fn)
    w_scale = (torch.rand(*lead, 2, generator=generator) + 0.1).repeat_interleave(INNER, dim=-1)
    w = torch.randn(*lead, 2 * INNER, HIDDEN, generator=generator)
    made = ternary_operands(w, w_scale, 0, torch.float8_e4m3fn, True)
    weight = WeightOperands(made.rows, made.columns, w_scale)
    gate_up = torch.randn(num_rows, 2 * INNER, generator=generator)
    gain = torch.rand(*lead, INNER, generator=generator) + 0.5 if sub_norm else None
    experts = None if num_experts is None else expert_R
    rstd = relu2_glu_quantize(gate_up, gain, EPS, "int8", 1, experts)[2]
    dy, probs_R1 = torch.randn(num_rows, INNER, generator=generator), None
    activation = dy, gate_up, gain, rstd
    if num_experts is None:
        got = code_product.activated_gradients(*activation, x_codes, x_scale, weight, 1)
    else:
        probs_R1 = torch.rand(num_rows, 1, generator=generator)
        product = probs_R1, grouped_code_product.RowCodes(x_codes, x_scale), weight
        got = grouped_code_product.grouped_activated_gradients(*activation, *product, ends_E, expert_R, 1)
    dgate_up, dgain, dprobs_R1 = (
        None if part is None else part.double()
        for part in relu2_glu_quantize_backward(dy, gate_up, gain, rstd, experts, probs_R1)
    )
    w_hat, x_hat = made.rows.double() * w_scale.double()[..., None], x_codes.double() * x_scale.double()
    if num_experts is None:
        wanted = dgate_up @ w_hat, dgate_up.T @ x_hat
    else:
        parts = list(zip(dgate_up.split(COUNTS), x_hat.split(COUNTS), w_hat, strict=True))
        wanted = torch.cat([d @ w for d, _, w in parts]), torch.stack([d.T @ x for d, x, _ in parts])
    for gradient, truth in zip(got[:2], wanted, strict=True):
        assert (gradient.double() - truth).norm() < 0.036 * truth.norm()
    assert (got[2] is None) == (dgain is None)
    if dgain is not None:
        torch.testing.assert_close(got[2].double(), dgain, rtol=1e-6, atol=1e-6)
    if dprobs_R1 is not None:
        assert torch.equal(got.probs_R1.double(), dprobs_R1)
