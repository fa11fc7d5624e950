"""BitLinear: linears with ternary weights and quantized inputs, split over tensor-parallel ranks.

Each linear owns its autograd function (quantize, gather, product), because the gather must carry codes and scales
and not dequantized numbers. Forward: exact integer products, scales after. Backward (straight-through, BitNet a4.8
section 3): the input's gradient is dY times the dequantized ternary weight, dense and unmasked; the weight's gradient
is dY^T times the dequantized input; scales get none.

With ``quant.weights = none`` the same functions multiply the unquantized input and weight: the bf16 baseline.
"""

import torch

from bitmoe.layers.collectives import gather_first_dim, sum_over_ranks, tree_sum
from bitmoe.layers.context import LayerContext
from bitmoe.layers.norm import SubNorm
from bitmoe.layers.quantize_input import quantize_grouped, quantize_whole_rows
from bitmoe.layers.sharding import ShardedParameters, mark_tensor_parallel
from bitmoe.quant.policy import split_groups
from bitmoe.quant.ternary_codes import CodeCache, ternarize_columns, ternarize_rows
from bitmoe_kernels.ternary_gemm import code_matmul

# Shapes: S = sequence, B = batch, T = tokens (S*B), H = hidden, O = output rows on this rank,
#         F = input features on this rank, G = groups on this rank.


class ColumnBitLinear(torch.nn.Module, ShardedParameters):
    """Linear whose output rows are split over tensor-parallel ranks (qkv, gate and up).

    Args:
        shape: this rank's weight; the last dimension is the input (H), the others are output rows.
        cut_dim: dimension of ``shape`` that is split over ranks.
        projection_O: which logical projection each flattened output row belongs to (q, k, v, or gate, up), [O].
        role: qkv or gate_up.
        context: policy and groups.
    """

    def __init__(
        self, shape: tuple[int, ...], cut_dim: int, projection_O: torch.Tensor, role: str, context: LayerContext
    ):
        super().__init__()
        self.groups, self.policy, self.role = context.groups, context.policy, role
        self.cut_dim, self.sequence_parallel = cut_dim, context.sequence_parallel
        self.weight = context.parameter(*shape)
        mark_tensor_parallel(self.weight, cut_dim)
        self.cache = CodeCache(self.policy, role, self._ternarize)
        num_groups, is_shared = split_groups(self.policy.groups, self.groups.tp.size())
        self.reduce_group = self.groups.tp if is_shared else None
        self.scale_ids_O = group_ids(projection_O, num_groups).to(context.device)
        self.num_scales = int(self.scale_ids_O.max()) + 1

    def cuts(self) -> dict:
        """The weight is split along its output rows."""
        return {"weight": ((self.cut_dim, self.groups.tp),)}

    def _ternarize(self):
        return ternarize_rows(self.weight.flatten(0, -2), self.scale_ids_O, self.num_scales, self.reduce_group)

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """Multiply [S, B, H] (or this rank's [S/tp, B, H] under sequence parallelism) into [S, B, O]."""
        codes, scale = self.cache.get() if self.policy.is_ternary else (None, None)
        return _ColumnProduct.apply(
            x_SBH, self.weight, codes, scale, self.role, self.policy, self.groups.tp, self.sequence_parallel
        )


def group_ids(projection_O: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Number the scales of output rows: rows of one projection are cut, in order, into ``num_groups`` equal groups."""
    ids = torch.empty_like(projection_O)
    for projection in projection_O.unique().tolist():
        rows = (projection_O == projection).nonzero().squeeze(1)
        ids[rows] = projection * num_groups + torch.arange(num_groups).repeat_interleave(len(rows) // num_groups)
    return ids


class _ColumnProduct(torch.autograd.Function):
    """Quantize where the token lives, gather codes and scales, multiply; the backward gathers the codes again."""

    @staticmethod
    def forward(ctx, x_SBH, weight, w_codes_OH, w_scale_O, role, policy, group, sequence_parallel):
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        if w_codes_OH is None:
            ctx.save_for_backward(x_SBH, None, weight, None)
            return _gathered(ctx, x_SBH) @ weight.flatten(0, -2).T
        codes_SBH, scale_SB1 = quantize_whole_rows(x_SBH, role, policy)
        ctx.save_for_backward(codes_SBH, scale_SB1, w_codes_OH, w_scale_O)
        ctx.weight_shape = weight.shape
        sums_TO = code_matmul(_gathered(ctx, codes_SBH).flatten(0, -2), w_codes_OH)
        scale_SB1 = _gathered(ctx, scale_SB1)
        y_TO = sums_TO.to(scale_SB1.dtype) * scale_SB1.flatten(0, -2) * w_scale_O
        return y_TO.view(*scale_SB1.shape[:-1], -1).to(x_SBH.dtype)

    @staticmethod
    def backward(ctx, grad_SBO):
        x_SBH, scale_SB1, weight, w_scale_O = ctx.saved_tensors
        weight_shape = weight.shape if scale_SB1 is None else ctx.weight_shape
        w_OH = weight.flatten(0, -2).to(grad_SBO.dtype)
        grad_x_SBH = (grad_SBO if w_scale_O is None else _scaled(grad_SBO, w_scale_O)) @ w_OH
        grad_x_SBH = sum_over_ranks(grad_x_SBH, ctx.group, scatter=ctx.sequence_parallel)
        if scale_SB1 is not None:
            grad_SBO = _scaled(grad_SBO, _gathered(ctx, scale_SB1))
        x_TH = _gathered(ctx, x_SBH).flatten(0, -2).to(grad_SBO.dtype)
        grad_weight = grad_SBO.flatten(0, -2).T @ x_TH
        return grad_x_SBH, grad_weight.view(weight_shape), *[None] * 6


def _gathered(ctx, x_SB: torch.Tensor) -> torch.Tensor:
    return gather_first_dim(x_SB, ctx.group) if ctx.sequence_parallel else x_SB


def _scaled(grad: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """grad * scale in fp32 (fp64 for fp64), rounded once."""
    return (grad * scale).to(grad.dtype)


class RowBitLinear(torch.nn.Module, ShardedParameters):
    """Linear whose input features are split over tensor-parallel ranks (o, down), with its sub-norm in front.

    Args:
        num_outputs: rows of the weight (H).
        num_inputs: input features on this rank (F).
        role: o or down.
        context: model, policy and groups.
    """

    def __init__(self, num_outputs: int, num_inputs: int, role: str, context: LayerContext):
        super().__init__()
        self.groups, self.policy, self.role = context.groups, context.policy, role
        self.sequence_parallel = context.sequence_parallel
        self.sub_norm = SubNorm(num_inputs, context) if context.model.sub_norm else None
        self.weight = context.parameter(num_outputs, num_inputs)
        mark_tensor_parallel(self.weight, dim=1)
        self.cache = CodeCache(self.policy, role, self._ternarize)
        self.num_groups, is_shared = split_groups(self.policy.groups, self.groups.tp.size())
        self.reduce_group = self.groups.tp if is_shared else None

    def cuts(self) -> dict:
        """The weight is split along its input columns."""
        return {"weight": ((1, self.groups.tp),)}

    def _ternarize(self):
        return ternarize_columns(self.weight, self.num_groups, self.reduce_group)

    def forward(self, x_SBF: torch.Tensor) -> torch.Tensor:
        """Multiply features [S, B, F], add over ranks: [S, B, H], or [S/tp, B, H] (sequence parallel)."""
        if self.sub_norm is not None:
            x_SBF = self.sub_norm(x_SBF)
        codes, scale = self.cache.get() if self.policy.is_ternary else (None, None)
        return _RowProduct.apply(
            x_SBF,
            self.weight,
            codes,
            scale,
            self.role,
            self.policy,
            self.groups.tp,
            self.reduce_group,
            self.sequence_parallel,
        )


class _RowProduct(torch.autograd.Function):
    """Quantize this rank's groups, multiply, add over ranks. One group over all ranks: add integers, scale after."""

    @staticmethod
    def forward(ctx, x_SBF, weight, w_codes_HF, w_scale_G, role, policy, group, reduce_group, sequence_parallel):
        ctx.group, ctx.sequence_parallel, lead = group, sequence_parallel, x_SBF.shape[:-1]
        reduce = {"scatter": sequence_parallel, "deterministic": policy.deterministic}
        if w_codes_HF is None:
            ctx.save_for_backward(x_SBF, None, weight, None)
            return sum_over_ranks(x_SBF @ weight.T, group, **reduce)
        codes_TF, scale_TG = quantize_grouped(x_SBF.flatten(0, -2), role, policy, w_scale_G.shape[0], reduce_group)
        ctx.save_for_backward(codes_TF, scale_TG, w_codes_HF, w_scale_G)
        if reduce_group is None:
            y_TH = group_products(codes_TF, w_codes_HF, scale_TG, w_scale_G)
            wire = y_TH.dtype if policy.deterministic else x_SBF.dtype
            return sum_over_ranks(y_TH.view(*lead, -1).to(wire), group, **reduce).to(x_SBF.dtype)
        sums_SBH = sum_over_ranks(code_matmul(codes_TF, w_codes_HF).view(*lead, -1), group, scatter=sequence_parallel)
        scale_SB1 = scale_TG.view(*lead, 1)
        if sequence_parallel:
            scale_SB1 = scale_SB1.chunk(group.size())[group.rank()]
        return (sums_SBH.to(scale_SB1.dtype) * scale_SB1 * w_scale_G).to(x_SBF.dtype)

    @staticmethod
    def backward(ctx, grad_SBH):
        x, scale_TG, weight, w_scale_G = ctx.saved_tensors
        if ctx.sequence_parallel:
            grad_SBH = gather_first_dim(grad_SBH, ctx.group)
        grad_TH, w_HF = grad_SBH.flatten(0, -2), weight.to(grad_SBH.dtype)
        grad_x_TF = grad_TH @ w_HF
        if scale_TG is None:
            grad_weight = grad_TH.T @ x.flatten(0, -2)
        else:
            grad_x_TF = _scaled(grad_x_TF.unflatten(-1, (len(w_scale_G), -1)), w_scale_G[:, None]).flatten(-2)
            grad_weight = group_outer(grad_TH, x, scale_TG)
        return grad_x_TF.view(*grad_SBH.shape[:-1], -1), grad_weight, *[None] * 7


def group_products(
    codes_TF: torch.Tensor, w_codes_HF: torch.Tensor, scale_TG: torch.Tensor, w_scale_G: torch.Tensor
) -> torch.Tensor:
    """Product whose contracted features lie in G groups with their own scales, added as a tree: [T, H]."""
    num_groups = len(w_scale_G)
    codes, w_codes = codes_TF.chunk(num_groups, 1), w_codes_HF.chunk(num_groups, 1)

    def part(group: int) -> torch.Tensor:
        sums_TH = code_matmul(codes[group], w_codes[group]).to(scale_TG.dtype)
        return sums_TH * scale_TG[:, group, None] * w_scale_G[group]

    return tree_sum(part, num_groups)


def group_outer(grad_TH: torch.Tensor, codes_TF: torch.Tensor, scale_TG: torch.Tensor) -> torch.Tensor:
    """Weight gradient [H, F] of ``group_products``: each group's token scale is folded into dY."""
    parts = [
        _scaled(grad_TH, scale_T1).T @ codes.to(grad_TH.dtype)
        for scale_T1, codes in zip(scale_TG.split(1, 1), codes_TF.chunk(scale_TG.shape[1], 1), strict=True)
    ]
    return torch.cat(parts, dim=1)
