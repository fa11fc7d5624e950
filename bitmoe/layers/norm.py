"""RMSNorm of the residual stream, and the sub-norm in front of row-parallel linears.

The residual stream's norm sees whole rows. The sub-norm (BitNet's SubLN) sees features split over tensor-parallel
ranks: its statistics are taken per quantization group, so a rank that owns whole groups needs no communication; the
one group of G = 1 is reduced over the ranks. Squares are added as ``wide_sum`` adds and their sum is rounded once, so
that the statistics, and the codes made from them, do not depend on the layout.
"""

import torch
import torch.distributed as dist

from bitmoe.layers.context import LayerContext
from bitmoe.layers.sharding import ShardedParameters, mark_tensor_parallel
from bitmoe.quant.policy import split_groups
from bitmoe_kernels.act_quant import NEIGHBOURS, wide_sum
from bitmoe_kernels.norm_quant import rms_norm, rms_norm_backward

# Shapes: T = tokens (any leading dims), H = hidden, F = features on this rank, G = groups on this rank.


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension, as megatron-core's specs build norms."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # Ranks see different tokens under sequence parallelism; megatron-core adds their gradients if told so.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x_TH: torch.Tensor | None = None) -> torch.Tensor:
        """Normalize [..., H]; without an input, the gain [H] for a kernel that normalizes.

        The gain by a call, because DDP brings the parameters of a module up to date when it is called.
        """
        return self.weight if x_TH is None else _Normalize.apply(x_TH, self.weight, self.eps)


class _Normalize(torch.autograd.Function):
    """RMSNorm that keeps its input and one number a row."""

    @staticmethod
    def forward(ctx, x_TH, gain_H, eps):
        y_TH, rstd_T1 = rms_norm(x_TH, gain_H, eps)
        ctx.save_for_backward(x_TH, gain_H, rstd_T1)
        return y_TH

    @staticmethod
    def backward(ctx, grad_TH):
        x_TH, gain_H, rstd_T1 = ctx.saved_tensors
        grad_x_TH, grad_gain_H = rms_norm_backward(grad_TH, x_TH, gain_H, rstd_T1)
        return grad_x_TH, grad_gain_H.to(gain_H.dtype), None


class SubNorm(torch.nn.Module, ShardedParameters):
    """RMSNorm over the features of each quantization group, with a gain per feature.

    Args:
        num_features: features on this rank.
        context: model, policy and groups.
    """

    def __init__(self, num_features: int, context: LayerContext):
        super().__init__()
        self.groups, self.eps = context.groups, context.model.norm_eps
        self.num_groups, is_shared = split_groups(context.policy.groups, context.groups.tp.size())
        self.reduce_group = context.groups.tp if is_shared else None
        self.weight = context.parameter(num_features)
        mark_tensor_parallel(self.weight, dim=0)

    def cuts(self) -> dict:
        """The gain lies along the split features."""
        return {"weight": ((0, self.groups.tp),)}

    def forward(self, x_TF: torch.Tensor | None = None) -> torch.Tensor:
        """Normalize [..., F]; without an input, the gain [F], as ``RMSNorm`` does."""
        if x_TF is None:
            return self.weight
        return sub_norm(x_TF, self.weight, self.eps, self.num_groups, self.reduce_group)


def sub_norm(
    x_TF: torch.Tensor,
    gain_TF: torch.Tensor,
    eps: float,
    num_groups: int,
    reduce_group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """RMSNorm per group of features.

    Args:
        x_TF: [..., F], bf16, fp32 or fp64.
        gain_TF: [F], or a gain per row that broadcasts against x_TF.
        eps: added to the mean square.
        num_groups: equal contiguous groups of the F features.
        reduce_group: ranks the one group is split over, or None.

    Returns:
        [..., F] in the dtype of x_TF.
    """
    return (_SubNormalize.apply(x_TF, num_groups, eps, reduce_group) * gain_TF).to(x_TF.dtype)


class _SubNormalize(torch.autograd.Function):
    """x / rms(x) per group, with both reductions over ranks when a group is split over them."""

    @staticmethod
    def forward(ctx, x_TF, num_groups, eps, reduce_group):
        x_TGF = _compute(x_TF).unflatten(-1, (num_groups, -1))
        num_ranks = 1 if reduce_group is None else reduce_group.size()
        count = x_TGF.shape[-1] * num_ranks
        rstd_TG1 = torch.rsqrt(_square_sum(x_TGF, reduce_group) * (1 / count) + eps).to(x_TGF.dtype)
        ctx.save_for_backward(x_TF, rstd_TG1)
        ctx.count, ctx.reduce_group = count, reduce_group
        return (x_TGF * rstd_TG1).flatten(-2).to(x_TF.dtype)

    @staticmethod
    def backward(ctx, grad_TF):
        x_TF, rstd_TG1 = ctx.saved_tensors
        unit_TGF = _compute(x_TF).unflatten(-1, (rstd_TG1.shape[-2], -1)) * rstd_TG1
        grad_TGF = _compute(grad_TF).unflatten(-1, (rstd_TG1.shape[-2], -1))
        dot_TG1 = _row_sum(grad_TGF * unit_TGF, ctx.reduce_group) / ctx.count
        grad_x_TGF = rstd_TG1 * (grad_TGF - unit_TGF * dot_TG1.to(grad_TGF.dtype))
        return grad_x_TGF.flatten(-2).to(x_TF.dtype), None, None, None


def _compute(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _square_sum(x_TGF: torch.Tensor, reduce_group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sums of squares of whole groups, fp64 [T, G, 1], the same on all ranks that hold parts of them."""
    if reduce_group is None:
        return wide_sum(x_TGF.square())
    if x_TGF.shape[-1] % NEIGHBOURS:
        # Neighbours are on two ranks.
        parts = [torch.empty_like(x_TGF) for _ in range(reduce_group.size())]
        dist.all_gather(parts, x_TGF.contiguous(), group=reduce_group)
        return wide_sum(torch.cat(parts, dim=-1).square())
    sum_TG1 = wide_sum(x_TGF.square())
    dist.all_reduce(sum_TG1, group=reduce_group)
    return sum_TG1


def _row_sum(x_TGF: torch.Tensor, reduce_group: dist.ProcessGroup | None) -> torch.Tensor:
    sums_TG1 = x_TGF.sum(-1, keepdim=True, dtype=torch.float64)
    if reduce_group is not None:
        dist.all_reduce(sums_TG1, group=reduce_group)
    return sums_TG1
