"""Routed experts in bf16 with SwiGLU, as fast as plain torch has them, and Liger's fused kernels.

The pipeline: sort copies of tokens by expert, gather their rows, ``torch._grouped_mm``, SwiGLU, ``torch._grouped_mm``,
and the weighted sum of each token's rows. Both index steps gather in the backward, too (additions by index would be
slower and have no fixed order). It is timed as it is and compiled.
"""

import os
from collections.abc import Callable

import torch
from moe_inputs import Inputs
from torch.nn.functional import silu

# Shapes: T = tokens, E = experts, K = experts of each token, R = T * K rows sorted by expert, H = hidden,
#         F = inner features.

Pass = Callable[[], tuple[torch.Tensor, tuple[torch.Tensor, ...]]]
"""Returns the output [T, H] and gradients of x, probs [T, K], w1 [E, 2F, H] and w2 [E, H, F]."""


class _CopyRows(torch.autograd.Function):
    """Each token's copies, sorted by expert; the backward adds the gradients of each token's rows."""

    @staticmethod
    def forward(ctx, x_TH, token_R, row_TK):
        ctx.save_for_backward(row_TK)
        return x_TH[token_R]

    @staticmethod
    def backward(ctx, grad_RH):
        (row_TK,) = ctx.saved_tensors
        return grad_RH[row_TK].sum(1), None, None


class _Combine(torch.autograd.Function):
    """The weighted sum of each token's rows."""

    @staticmethod
    def forward(ctx, y_RH, probs_TK, token_R, slot_R, row_TK):
        ctx.save_for_backward(y_RH, probs_TK, token_R, slot_R, row_TK)
        return (y_RH[row_TK] * probs_TK.to(y_RH.dtype).unsqueeze(2)).sum(1)

    @staticmethod
    def backward(ctx, grad_TH):
        y_RH, probs_TK, token_R, slot_R, row_TK = ctx.saved_tensors
        prob_R = probs_TK.flatten()[slot_R].to(grad_TH.dtype)
        dprobs_TK = (y_RH[row_TK] * grad_TH.unsqueeze(1)).sum(2, dtype=torch.float32)
        return grad_TH[token_R] * prob_R.unsqueeze(1), dprobs_TK.to(probs_TK.dtype), None, None, None


def grouped_swiglu(
    x_TH: torch.Tensor, probs_TK: torch.Tensor, w1_EOH: torch.Tensor, w2_EHF: torch.Tensor, experts_TK: torch.Tensor
) -> torch.Tensor:
    """The pipeline, [T, H]; ``w1_EOH`` holds F rows of gate, then F of up."""
    num_experts, top_k = len(w1_EOH), experts_TK.shape[1]
    expert_R, slot_R = experts_TK.flatten().sort(stable=True)
    all_experts = torch.arange(num_experts, device=x_TH.device)
    ends_E = torch.searchsorted(expert_R, all_experts, right=True).to(torch.int32)
    rows = torch.arange(len(slot_R), device=x_TH.device)
    row_TK = torch.empty_like(slot_R).scatter_(0, slot_R, rows).view_as(experts_TK)
    token_R = slot_R // top_k
    gate_up = torch._grouped_mm(_CopyRows.apply(x_TH, token_R, row_TK), w1_EOH.transpose(1, 2), offs=ends_E)
    gate_RF, up_RF = gate_up.chunk(2, dim=1)
    y_RH = torch._grouped_mm(silu(gate_RF) * up_RF, w2_EHF.transpose(1, 2), offs=ends_E)
    return _Combine.apply(y_RH, probs_TK, token_R, slot_R, row_TK)


def swiglu_pass(inputs: Inputs, function: Callable[..., torch.Tensor]) -> Pass:
    """A pass of any function with the arguments of ``grouped_swiglu``."""
    tensors = (
        inputs.x_TH,
        inputs.probs_TE.gather(1, inputs.experts_TK),
        inputs.w1_E2FH.flatten(1, 2),
        inputs.w2_EHF,
    )
    leaves = tuple(tensor.detach().requires_grad_() for tensor in tensors)

    def run() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        y_TH = function(*leaves, inputs.experts_TK)
        return y_TH.detach(), torch.autograd.grad(y_TH, leaves, inputs.dy_TH)

    return run


def eager() -> Callable[..., torch.Tensor]:
    """The pipeline as it is."""
    return grouped_swiglu


def compiled() -> Callable[..., torch.Tensor]:
    """The pipeline, forward and backward compiled."""
    return torch.compile(grouped_swiglu, dynamic=False)


def liger() -> Callable[..., torch.Tensor]:
    """Liger's fused experts, which wait for the GPU to learn how many tiles there are.

    Raises:
        ImportError: liger-kernel is not installed.
    """
    # Tuning compiles some 240 kernels a shape, minutes; what the user sets stands.
    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def function(x_TH, probs_TK, w1_EOH, w2_EHF, experts_TK):
        return LigerFusedMoEFunction.apply(x_TH, w1_EOH, w2_EHF, experts_TK.int(), probs_TK)

    return function


BASELINES = {"_grouped_mm, compiled": compiled, "_grouped_mm, eager": eager, "Liger fused MoE, not tuned": liger}
"""Makers by title."""

CANNOT_RECORD = {"Liger fused MoE, not tuned"}
"""Those that a CUDA graph cannot hold."""

FASTEST = "_grouped_mm, compiled"
"""What is timed where one must do."""
