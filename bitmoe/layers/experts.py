"""Routed experts: ternary gated FFNs with scales of their own, multiplied as grouped products.

Quantization and dispatch are one autograd function with the first product: a token is quantized once, where it
lives; codes travel; the backward pass brings bf16 (or fp32) gradients home. Expert parallelism cuts whole experts over
ranks, expert tensor parallelism the inner features of each.
"""

import torch
import torch.distributed as dist

from bitmoe.layers.bit_linear import group_ids
from bitmoe.layers.collectives import tree_sum
from bitmoe.layers.context import LayerContext
from bitmoe.layers.dispatch import Dispatch
from bitmoe.layers.feed_forward import gated_activation
from bitmoe.layers.norm import sub_norm
from bitmoe.layers.quantize_input import quantize_grouped, quantize_whole_rows
from bitmoe.layers.sharding import ShardedParameters, mark_expert
from bitmoe.quant.policy import QuantPolicy, split_groups
from bitmoe.quant.ternary_codes import CodeCache, ternarize_columns, ternarize_rows
from bitmoe_kernels.grouped_ternary_gemm import grouped_code_matmul, grouped_matmul, grouped_outer

# Shapes: T = tokens of this rank, R = rows (token copies) sorted by local expert, E = local experts, H = hidden,
#         F = inner features on this rank, G = quantization groups on this rank.


class RoutedExperts(torch.nn.Module, ShardedParameters):
    """All experts of one layer that live on this rank.

    Weights are [E, 2, F, H] (gate, up) and [E, H, F] (down), gains [E, F]; the checkpoint sees the global tensors.

    Args:
        context: model, policy and groups.
    """

    is_expert = True

    def __init__(self, context: LayerContext):
        super().__init__()
        self.groups, self.policy = context.groups, context.policy
        self.activation, self.eps = context.model.activation, context.model.norm_eps
        num_experts = context.moe.num_experts // self.groups.ep.size()
        num_features = context.moe.ffn_hidden_size // self.groups.etp.size()
        hidden_size = context.model.hidden_size
        self.fc1_weight = context.parameter(num_experts, 2, num_features, hidden_size)
        self.fc2_weight = context.parameter(num_experts, hidden_size, num_features)
        self.sub_norm_weight = context.parameter(num_experts, num_features) if context.model.sub_norm else None
        for parameter in self.parameters():
            mark_expert(parameter, dim=0)
        self.num_groups, is_shared = split_groups(self.policy.groups, self.groups.etp.size())
        self.reduce_group = self.groups.etp if is_shared else None
        projection_O = torch.arange(num_experts * 2).repeat_interleave(num_features)
        self.scale_ids_O = group_ids(projection_O, self.num_groups).to(context.device)
        self.num_scales = num_experts * 2 * self.num_groups
        self.fc1_cache = CodeCache(self.policy, "gate_up", self._ternarize_fc1)
        self.fc2_cache = CodeCache(self.policy, "down", self._ternarize_fc2)

    def cuts(self) -> dict:
        """Experts are split over ep, inner features over etp."""
        ep, etp = self.groups.ep, self.groups.etp
        return {
            "fc1_weight": ((0, ep), (2, etp)),
            "fc2_weight": ((0, ep), (2, etp)),
            "sub_norm_weight": ((0, ep), (1, etp)),
        }

    def _ternarize_fc1(self):
        w_OH = self.fc1_weight.flatten(0, 2)
        codes_OH, scale_O = ternarize_rows(w_OH, self.scale_ids_O, self.num_scales, self.reduce_group)
        num_experts = len(self.fc1_weight)
        return codes_OH.unflatten(0, (num_experts, -1)), scale_O.unflatten(0, (num_experts, -1))

    def _ternarize_fc2(self):
        return ternarize_columns(self.fc2_weight, self.num_groups, self.reduce_group)

    def forward(self, x_TH: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """Send this rank's tokens to their experts and compute there.

        Args:
            x_TH: normalized tokens of this rank, [T, H].
            dispatch: the trip to take.

        Returns:
            Outputs on the experts' ranks, [R, H], partial over etp; ``dispatch.combine`` brings them home.
        """
        is_ternary = self.policy.is_ternary
        codes, scale = self.fc1_cache.get() if is_ternary else (None, None)
        gate_up = _DispatchedProduct.apply(x_TH, self.fc1_weight, codes, scale, self.policy, dispatch)
        x_RF = gated_activation(self.activation, gate_up)
        counts_E = dispatch.counts_E
        if self.sub_norm_weight is not None:
            gain_RF = _RepeatedGain.apply(self.sub_norm_weight, counts_E, len(x_RF))
            x_RF = sub_norm(x_RF, gain_RF, self.eps, self.num_groups, self.reduce_group)
        codes, scale = self.fc2_cache.get() if is_ternary else (None, None)
        return _ExpertRowProduct.apply(x_RF, self.fc2_weight, codes, scale, self.policy, counts_E, self.reduce_group)


def _per_row(scale_E: torch.Tensor, counts_E: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Repeat each expert's [E, ...] entry for its rows: [R, ...]."""
    return scale_E.repeat_interleave(counts_E.to(scale_E.device), dim=0, output_size=num_rows)


class _RepeatedGain(torch.autograd.Function):
    """Each expert's gain for each of its rows; its gradient is added up over the rows in fp32."""

    @staticmethod
    def forward(ctx, gain_EF, counts_E, num_rows):
        ctx.counts_E = counts_E
        return _per_row(gain_EF, counts_E, num_rows)

    @staticmethod
    def backward(ctx, grad_RF):
        counts_E = ctx.counts_E.to(grad_RF.device)
        expert_R = _per_row(torch.arange(len(counts_E), device=grad_RF.device), counts_E, len(grad_RF))
        dtype = torch.promote_types(grad_RF.dtype, torch.float32)
        grad_EF = torch.zeros(len(counts_E), grad_RF.shape[1], dtype=dtype, device=grad_RF.device)
        return grad_EF.index_add_(0, expert_R, grad_RF.to(dtype)).to(grad_RF.dtype), None, None


def _sum_dtype(x: torch.Tensor) -> torch.dtype:
    """bf16 models on GPUs round sums of codes once to bf16 (torch's grouped kernel); others keep them exact in fp32."""
    return torch.bfloat16 if x.is_cuda and x.dtype == torch.bfloat16 else torch.float32


class _DispatchedProduct(torch.autograd.Function):
    """Quantize at home, dispatch codes, multiply by gate and up; gradients come home along the same way."""

    @staticmethod
    def forward(ctx, x_TH, weight, w_codes_EOH, w_scale_EO, policy: QuantPolicy, dispatch: Dispatch):
        ctx.dispatch, ctx.weight_shape = dispatch, weight.shape
        if w_codes_EOH is None:
            rows_RH, _ = dispatch.send(x_TH, torch.ones_like(x_TH[:, :1], dtype=torch.float32))
            w_EOH = weight.flatten(1, 2)
            ctx.save_for_backward(rows_RH, None, w_EOH, None)
            return grouped_matmul(rows_RH, w_EOH.transpose(1, 2), dispatch.counts_E)
        codes_TH, scale_T1 = quantize_whole_rows(x_TH, "gate_up", policy)
        codes_RH, scale_R1 = dispatch.send(codes_TH, scale_T1)
        ctx.save_for_backward(codes_RH, scale_R1, w_codes_EOH, w_scale_EO)
        sums_RO = grouped_code_matmul(codes_RH, w_codes_EOH, dispatch.counts_E, _sum_dtype(x_TH))
        w_scale_RO = _per_row(w_scale_EO, dispatch.counts_E, len(codes_RH))
        return (sums_RO.to(scale_R1.dtype) * scale_R1 * w_scale_RO).to(x_TH.dtype)

    @staticmethod
    def backward(ctx, grad_RO):
        rows_RH, scale_R1, w_EOH, w_scale_EO = ctx.saved_tensors
        counts_E, dtype = ctx.dispatch.counts_E, grad_RO.dtype
        grad_scaled = grad_RO
        if w_scale_EO is not None:
            grad_scaled = (grad_RO * _per_row(w_scale_EO, counts_E, len(grad_RO))).to(dtype)
            grad_RO = (grad_RO * scale_R1).to(dtype)
        grad_RH = grouped_matmul(grad_scaled, w_EOH.to(dtype), counts_E)
        grad_weight = grouped_outer(grad_RO.contiguous(), rows_RH.to(dtype), counts_E)
        return ctx.dispatch.send_back(grad_RH), grad_weight.view(ctx.weight_shape), *[None] * 4


class _ExpertRowProduct(torch.autograd.Function):
    """Quantize the inner features group by group and multiply by down; partial sums over etp."""

    @staticmethod
    def forward(ctx, x_RF, weight, w_codes_EHF, w_scale_EG, policy, counts_E, reduce_group: dist.ProcessGroup | None):
        ctx.counts_E = counts_E
        if w_codes_EHF is None:
            ctx.save_for_backward(x_RF, None, weight, None)
            return grouped_matmul(x_RF, weight.transpose(1, 2), counts_E)
        num_groups = w_scale_EG.shape[1]
        codes_RF, scale_RG = quantize_grouped(x_RF, "down", policy, num_groups, reduce_group)
        ctx.save_for_backward(codes_RF, scale_RG, w_codes_EHF, w_scale_EG)
        w_scale_RG = _per_row(w_scale_EG, counts_E, len(codes_RF))
        codes, w_codes = codes_RF.chunk(num_groups, 1), w_codes_EHF.chunk(num_groups, 2)

        def part(group: int) -> torch.Tensor:
            dtype = _sum_dtype(x_RF) if reduce_group is None else torch.float32
            sums_RH = grouped_code_matmul(codes[group], w_codes[group], counts_E, dtype)
            if reduce_group is not None:
                # One group over all etp ranks: add integers before scaling, and hand the sum on from one rank only.
                dist.all_reduce(sums_RH, group=reduce_group)
                sums_RH = sums_RH if reduce_group.rank() == 0 else torch.zeros_like(sums_RH)
            return sums_RH.to(scale_RG.dtype) * scale_RG[:, group, None] * w_scale_RG[:, group, None]

        return tree_sum(part, num_groups).to(x_RF.dtype)

    @staticmethod
    def backward(ctx, grad_RH):
        x_RF, scale_RG, w_EHF, w_scale_EG = ctx.saved_tensors
        counts_E, dtype = ctx.counts_E, grad_RH.dtype
        grad_RH = grad_RH.contiguous()
        grad_RF = grouped_matmul(grad_RH, w_EHF.to(dtype), counts_E)
        if scale_RG is None:
            return grad_RF, grouped_outer(grad_RH, x_RF, counts_E), *[None] * 5
        num_groups = scale_RG.shape[1]
        w_scale_RG = _per_row(w_scale_EG, counts_E, len(grad_RF))
        grad_RF = (grad_RF.unflatten(1, (num_groups, -1)) * w_scale_RG[:, :, None]).to(dtype).flatten(1)
        grad_weight = torch.cat(
            [
                grouped_outer((grad_RH * scale_R1).to(dtype), codes.to(dtype), counts_E)
                for scale_R1, codes in zip(scale_RG.split(1, 1), x_RF.chunk(num_groups, 1), strict=True)
            ],
            dim=2,
        )
        return grad_RF, grad_weight, *[None] * 5
