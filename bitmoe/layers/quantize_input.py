"""From activations to codes: the input of every quantized linear, by role and format.

A column-parallel input row is whole on every rank, so its one scale needs no communication. A row-parallel input is
split over ranks by quantization groups: each group has its own scale and its own top-K. Where the one group of G = 1
spans ranks, rows are exchanged, quantized whole by the single-rank code, and the codes sent back.

What comes before a linear (a norm, a gated activation) is quantized in the same kernel that computes it. All
quantizers are straight-through: their backward is that of the norm or activation alone.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from bitmoe.config.choices import ActFormat
from bitmoe.layers.collectives import features_to_rows, gather_first_dim, rows_to_features
from bitmoe.layers.norm import RMSNorm
from bitmoe.quant.policy import QuantPolicy
from bitmoe_kernels.act_quant import quantize_fp4, quantize_int4, quantize_int8
from bitmoe_kernels.norm_quant import rms_norm_backward, rms_norm_quantize, sub_norm_backward, sub_norm_quantize
from bitmoe_kernels.relu2_glu import relu2_glu_quantize
from bitmoe_kernels.sparsify import topk_mask

# Shapes: T = tokens (any leading dims), D = features, F = features on this rank, G = groups on this rank, E = experts.

_QUANTIZERS = {ActFormat.int8: quantize_int8, ActFormat.int4: quantize_int4, ActFormat.fp4: quantize_fp4}


class Quantized(NamedTuple):
    """A linear's input: codes and scales, and a way for its gradient."""

    carrier_TD: torch.Tensor
    """Stands in for the dequantized input in autograd; its values are never read and take no memory."""
    codes_TD: torch.Tensor
    """int8, or e4m3 where FP8 tensor cores multiply them exactly."""
    scale_TG: torch.Tensor
    """fp32 (fp64 for fp64), one for each token and group."""


def flat_tokens(x: Quantized | torch.Tensor) -> Quantized | torch.Tensor:
    """Tokens in one dimension: [..., D] as [T, D]."""
    return x.flatten(0, -2) if isinstance(x, torch.Tensor) else Quantized(*(part.flatten(0, -2) for part in x))


def quantize_rows(x_TD: torch.Tensor, role: str, policy: QuantPolicy) -> Quantized:
    """Quantize rows that are whole on this rank, with one scale each."""
    return Quantized(*_Quantize.apply(x_TD, None, role, policy, None, None))


def quantize_groups(
    x_TF: torch.Tensor,
    role: str,
    policy: QuantPolicy,
    num_groups: int,
    exchange_group: dist.ProcessGroup | None,
    weight_T1: torch.Tensor | None = None,
) -> Quantized:
    """Quantize a row-parallel input, group by group.

    Args:
        x_TF: activations [..., F] on this rank.
        role: o or down.
        policy: current formats.
        num_groups: groups on this rank.
        exchange_group: ranks the one group is split over (then num_groups is 1), or None.
        weight_T1: what each token is multiplied by; all of it goes into its scales.
    """
    return Quantized(*_Quantize.apply(x_TF, weight_T1, role, policy, num_groups, exchange_group))


def normalize_rows(x_TD: torch.Tensor, norm: RMSNorm, role: str, policy: QuantPolicy) -> tuple[torch.Tensor, Quantized]:
    """RMSNorm and quantization in one.

    Returns:
        ``x_TD`` for the residual stream (use it, not the argument: both gradients then meet in one kernel), and the
        quantized normalized rows.
    """
    residual_TD, *quantized = _NormQuantize.apply(x_TD, norm(), norm.eps, role, policy, False)
    return residual_TD, Quantized(*quantized)


def normalize_rows_for_router(
    x_TD: torch.Tensor, norm: RMSNorm, role: str, policy: QuantPolicy
) -> tuple[torch.Tensor, torch.Tensor, Quantized]:
    """The same, with the normalized rows themselves, which a router multiplies, in second place."""
    residual_TD, y_TD, *quantized = _NormQuantize.apply(x_TD, norm(), norm.eps, role, policy, True)
    return residual_TD, y_TD, Quantized(*quantized)


def normalize_groups(
    x_TF: torch.Tensor, gain_F: torch.Tensor, eps: float, role: str, policy: QuantPolicy, num_groups: int
) -> Quantized:
    """Sub-norm, quantization and top-K in one, for groups that are whole on this rank."""
    return Quantized(*_SubNormQuantize.apply(x_TF, gain_F, eps, role, policy, num_groups))


class DownInput(NamedTuple):
    """ReLU2-GLU, sub-norm and quantizer in front of down, for groups that are whole on this rank.

    No autograd function of its own: it belongs to that of the product in front, whose gradient then needs no copy of
    gate and up's in 16 bits.
    """

    eps: float
    """Of the sub-norm."""
    policy: QuantPolicy
    num_groups: int
    """Groups on this rank."""
    is_source_kept: bool
    """Gate and up are kept for the backward; else it multiplies them again."""

    def quantize(
        self,
        gate_up_T2F: torch.Tensor,
        gain: torch.Tensor | None,
        expert_T: torch.Tensor | None = None,
        weight_T1: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes [..., F] and scale [..., G] of down's input, and 1 / rms [..., G] of the sub-norm, where there is one.

        Args:
            gate_up_T2F: gate and up side by side, [..., 2F].
            gain: of the sub-norm, [F] or [E, F]; None without one.
            expert_T: int32 [T], which of E experts each row belongs to, sorted; None where the gain is [F].
            weight_T1: routing probabilities, which the scales take in; None without routing.
        """
        act_format, where = self.policy.act_format("down"), (self.num_groups, expert_T, weight_T1)
        quantized = relu2_glu_quantize(gate_up_T2F, gain, self.eps, act_format.value, *where)
        self.policy.statistics.add_activations("down", quantized[0], act_format)
        return quantized


def row_code_dtype(x_TD: torch.Tensor, act_format: ActFormat) -> torch.dtype:
    """Type of the codes of whole rows: e4m3 holds all 4-bit codes, and FP8 products are the faster ones on GPUs."""
    is_fast = x_TD.is_cuda and x_TD.dtype == torch.bfloat16 and act_format in (ActFormat.int4, ActFormat.fp4)
    return torch.float8_e4m3fn if is_fast else torch.int8


def stand_in(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A tensor of this shape whose values nobody reads, which takes no memory."""
    return x.new_empty(1).expand(shape)


def without_code_gradients(ctx, *codes_and_scale: torch.Tensor) -> None:
    """Codes and scales get no gradients, and the backward no zeros in their place: a tensor of the codes' size."""
    ctx.mark_non_differentiable(*codes_and_scale)
    ctx.set_materialize_grads(False)


def _whole_rows(x_TD: torch.Tensor, role: str, policy: QuantPolicy) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [..., D] and scale [..., 1], with top-K."""
    codes_TD, scale_T1 = _QUANTIZERS[policy.act_format(role)](x_TD)
    keep = policy.keep(role)
    return (codes_TD * topk_mask(x_TD, keep=keep) if keep < 1 else codes_TD), scale_T1


def _groups(x_TF: torch.Tensor, role: str, policy: QuantPolicy, num_groups: int, exchange_group):
    """int8 codes [..., F] and scale [..., G]."""
    if exchange_group is None:
        codes_TGF, scale_TG1 = _whole_rows(x_TF.unflatten(-1, (num_groups, -1)), role, policy)
        return codes_TGF.flatten(-2), scale_TG1.squeeze(-1)
    rows_TF = x_TF.flatten(0, -2)
    codes_rows, scale_rows = _whole_rows(features_to_rows(rows_TF, exchange_group), role, policy)
    codes_TF = rows_to_features(codes_rows, len(rows_TF), exchange_group)
    scale_T1 = gather_first_dim(scale_rows, exchange_group)[: len(rows_TF)]
    return codes_TF.view_as(x_TF), scale_T1.view(*x_TF.shape[:-1], 1)


class _Quantize(torch.autograd.Function):
    """Codes of x, times a weight; the gradient passes."""

    @staticmethod
    def forward(ctx, x_TD, weight_T1, role, policy, num_groups, exchange_group):
        if num_groups is None:
            code_dtype, quantize = row_code_dtype(x_TD, policy.act_format(role)), _QUANTIZERS[policy.act_format(role)]
            codes_TD, scale_TG = quantize(x_TD) if code_dtype == torch.int8 else quantize(x_TD, code_dtype)
        else:
            codes_TD, scale_TG = _groups(x_TD, role, policy, num_groups, exchange_group)
        if weight_T1 is not None:
            scale_TG = scale_TG * weight_T1.to(scale_TG.dtype)
        ctx.save_for_backward(None if weight_T1 is None else x_TD, weight_T1)
        policy.statistics.add_activations(role, codes_TD, policy.act_format(role))
        without_code_gradients(ctx, codes_TD, scale_TG)
        return stand_in(x_TD, x_TD.shape), codes_TD, scale_TG

    @staticmethod
    def backward(ctx, grad_TD, *unused):
        x_TD, weight_T1 = ctx.saved_tensors
        if weight_T1 is None:
            return grad_TD, *[None] * 5
        wide_grad_TD = grad_TD.to(torch.promote_types(grad_TD.dtype, torch.float32))
        grad_weight_T1 = (wide_grad_TD * x_TD).sum(-1, keepdim=True).to(weight_T1.dtype)
        return (wide_grad_TD * weight_T1).to(grad_TD.dtype), grad_weight_T1, *[None] * 4


class _NormQuantize(torch.autograd.Function):
    """x, its RMSNorm where asked for, and codes of that; the gradients of all uses of x meet in the norm's backward."""

    @staticmethod
    def forward(ctx, x_TD, gain_D, eps, role, policy, with_normalized):
        act_format = policy.act_format(role)
        code_dtype = row_code_dtype(x_TD, act_format)
        codes_TD, scale_T1, rstd_T1, *y_TD = rms_norm_quantize(
            x_TD, gain_D, eps, act_format.value, code_dtype, with_normalized
        )
        policy.statistics.add_activations(role, codes_TD, act_format)
        ctx.save_for_backward(x_TD, gain_D, rstd_T1)
        without_code_gradients(ctx, codes_TD, scale_T1)
        return x_TD.view_as(x_TD), *y_TD, stand_in(x_TD, x_TD.shape), codes_TD, scale_T1

    @staticmethod
    def backward(ctx, grad_residual_TD, *grads):
        # Of the normalized rows and of the carrier; codes and scales have none.
        grads = [grad for grad in grads if grad is not None]
        if not grads:
            return grad_residual_TD, *[None] * 5
        x_TD, gain_D, rstd_T1 = ctx.saved_tensors
        grad_x_TD, grad_gain_D = rms_norm_backward(sum(grads[1:], grads[0]), x_TD, gain_D, rstd_T1, grad_residual_TD)
        return grad_x_TD, grad_gain_D.to(gain_D.dtype), *[None] * 4


class _SubNormQuantize(torch.autograd.Function):
    """Codes of the sub-norm of x."""

    @staticmethod
    def forward(ctx, x_TF, gain_F, eps, role, policy, num_groups):
        act_format = policy.act_format(role)
        codes_TF, scale_TG, rstd_TG = sub_norm_quantize(
            x_TF, gain_F, eps, act_format.value, num_groups, policy.keep(role)
        )
        policy.statistics.add_activations(role, codes_TF, act_format)
        ctx.save_for_backward(x_TF, gain_F, rstd_TG)
        without_code_gradients(ctx, codes_TF, scale_TG)
        return stand_in(x_TF, x_TF.shape), codes_TF, scale_TG

    @staticmethod
    def backward(ctx, grad_TF, *unused):
        x_TF, gain_F, rstd_TG = ctx.saved_tensors
        grad_x_TF, grad_gain_F = sub_norm_backward(grad_TF, x_TF, gain_F, rstd_TG)
        return grad_x_TF, grad_gain_F.to(gain_F.dtype), *[None] * 4
