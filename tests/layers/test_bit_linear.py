"""Gradients of BitLinear go straight through: dense, unmasked, without clip mask; and which rows share a scale."""

import pytest
import torch

from bitmoe.config.choices import ActFormat, BackwardFormat, Recompute
from bitmoe.config.schema import BitStage, ModelConfig, MoEConfig, ParallelConfig, QuantConfig
from bitmoe.layers.bit_linear import ColumnBitLinear, RowBitLinear, group_ids
from bitmoe.layers.context import LayerContext
from bitmoe.parallel.process_groups import make_groups, start
from bitmoe.quant.policy import QuantPolicy
from bitmoe_kernels.act_quant import quantize_int4, quantize_int8
from bitmoe_kernels.sparsify import topk_mask
from bitmoe_kernels.weight_quant import ternarize

# Shapes: T = tokens, I = input features, O = output features, G = groups.

TOKENS, INPUTS, OUTPUTS = 6, 32, 16


def make_context(groups, backward_format, dtype):
    start()
    stage = BitStage(qkv=ActFormat.int4, o_keep=0.5, gate_up=ActFormat.int4)
    return LayerContext(
        model=ModelConfig(sub_norm=False),
        moe=MoEConfig(),
        policy=QuantPolicy(QuantConfig(groups=groups, backward=backward_format, stages=[stage])),
        groups=make_groups(ParallelConfig()),
        sequence_parallel=False,
        recompute=Recompute.none,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def make_input():
    """Weight, input and gradient of the output; the input has an outlier, which INT4 clips."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((OUTPUTS, INPUTS), (TOKENS, INPUTS), (TOKENS, OUTPUTS))
    w_OI, x_TI, grad_TO = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)
    x_TI[:, 3] = 50.0
    return w_OI, x_TI, grad_TO


def run_column(groups, backward_format=BackwardFormat.bf16, dtype=torch.float64):
    context = make_context(groups, backward_format, dtype)
    projection_O = torch.tensor([0, 1]).repeat_interleave(OUTPUTS // 2)
    return backward(ColumnBitLinear((OUTPUTS, INPUTS), 0, projection_O, "qkv", context), dtype)


def run_row(groups, backward_format=BackwardFormat.bf16, dtype=torch.float64):
    context = make_context(groups, backward_format, dtype)
    return backward(RowBitLinear(OUTPUTS, INPUTS, "o", context), dtype)


def backward(linear, dtype):
    w_OI, x_TI, grad_TO = (tensor.to(dtype) for tensor in make_input())
    linear.weight.data.copy_(w_OI)
    x_SBI = x_TI.unsqueeze(1).requires_grad_()
    y_SBO = linear(x_SBI)
    y_SBO.backward(grad_TO.unsqueeze(1))
    return y_SBO.squeeze(1).detach(), x_SBI.grad.squeeze(1), linear.weight.grad


@pytest.mark.parametrize("groups", [1, 4])
def test_column(groups, ranks):
    [(y_TO, grad_x_TI, grad_w_OI)] = ranks(1).run(run_column, groups)
    w_OI, x_TI, grad_TO = make_input()
    codes_OI, scale_G = ternarize(w_OI, groups=2 * groups, dim=0)
    w_hat_OI = codes_OI * scale_G.double().repeat_interleave(OUTPUTS // (2 * groups))[:, None]
    codes_TI, scale_T1 = quantize_int4(x_TI)
    assert (codes_TI[:, 3] == 7).all()
    torch.testing.assert_close(y_TO, codes_TI * scale_T1 @ w_hat_OI.T)
    torch.testing.assert_close(grad_x_TI, grad_TO @ w_hat_OI)
    torch.testing.assert_close(grad_w_OI, grad_TO.T @ (codes_TI * scale_T1))


@pytest.mark.parametrize("groups", [1, 4])
def test_row(groups, ranks):
    [(y_TO, grad_x_TI, grad_w_OI)] = ranks(1).run(run_row, groups)
    w_OI, x_TI, grad_TO = make_input()
    codes_OI, scale_G = ternarize(w_OI, groups=groups, dim=1)
    w_hat_OI = codes_OI * scale_G.double().repeat_interleave(INPUTS // groups)
    codes_TI, scale_TG = quantize_int8(x_TI, groups)
    mask_TI = topk_mask(x_TI, 0.5, groups)
    x_hat_TI = codes_TI * mask_TI * scale_TG.repeat_interleave(INPUTS // groups, dim=1)
    torch.testing.assert_close(y_TO, x_hat_TI @ w_hat_OI.T)
    # Unmasked: inputs that top-K removed get their gradient like all others.
    torch.testing.assert_close(grad_x_TI, grad_TO @ w_hat_OI)
    assert (grad_x_TI[~mask_TI] != 0).all()
    torch.testing.assert_close(grad_w_OI, grad_TO.T @ x_hat_TI)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("run", [run_column, run_row], ids=["column", "row"])
def test_backward_8bit(run, groups, ranks):
    """The same forward; gradients of a rounded dY, those of inputs as dense and unmasked as the others."""
    [(wanted_y_TO, exact, wanted_w_OI)] = ranks(1).run(run, groups, BackwardFormat.bf16, torch.float32)
    [(y_TO, grad, grad_w_OI)] = ranks(1).run(run, groups, BackwardFormat["8bit"], torch.float32)
    assert torch.equal(y_TO, wanted_y_TO)
    assert torch.cosine_similarity(grad.flatten(), exact.flatten(), 0) > 0.999
    assert 1e-4 < (grad - exact).norm() / exact.norm() < 0.06
    assert (grad != 0).all()
    # Codes are INT8 on CPU: with groups, the gradient of their weight does not round.
    error = (grad_w_OI - wanted_w_OI).norm() / wanted_w_OI.norm()
    assert error == 0 if run is run_row and groups > 1 else 1e-4 < error < 0.02


def test_group_ids():
    interleaved = torch.tensor([0, 0, 1, 2] * 2).repeat_interleave(2)
    # q has twice the rows of k and v; each projection is cut in the order of its rows.
    assert group_ids(interleaved, 1).tolist() == [0, 0, 0, 0, 1, 1, 2, 2] * 2
    assert group_ids(interleaved, 2).tolist() == [0, 0, 0, 0, 2, 2, 4, 4, 1, 1, 1, 1, 3, 3, 5, 5]
    assert group_ids(torch.tensor([0, 0, 1, 1]), 2).tolist() == [0, 1, 2, 3]
