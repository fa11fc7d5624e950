"""BitLinear: linears with ternary weights and quantized inputs, split over tensor-parallel ranks.

Inputs come quantized (``quantize_input``); each linear owns the autograd function of its gather, product and sum over
ranks, because the gather must carry codes and scales and not dequantized numbers. The mathematics of one rank is in
``code_product``.

With ``quant.weights = none`` inputs come unquantized: the bf16 baseline (``plain_product``).
"""

import torch
import torch.distributed as dist

from bitmoe.config.choices import Activation, Recompute
from bitmoe.layers.activation import gated_activation
from bitmoe.layers.code_product import activated_gradients, gradients, scaled_product
from bitmoe.layers.collectives import gather_first_dim, sum_over_ranks
from bitmoe.layers.context import LayerContext
from bitmoe.layers.main_grad import into_main_grad
from bitmoe.layers.norm import SubNorm
from bitmoe.layers.plain_product import PlainColumnProduct, PlainRowProduct
from bitmoe.layers.quantize_input import (
    DownInput,
    Quantized,
    normalize_groups,
    quantize_groups,
    quantize_rows,
    stand_in,
    without_code_gradients,
)
from bitmoe.layers.sharding import ShardedParameters, mark_tensor_parallel
from bitmoe.layers.wire import CodeWire
from bitmoe.quant.policy import split_groups
from bitmoe.quant.ternary_codes import CodeCache, absmean_columns, absmean_rows
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
        self.cut_dim, self.sequence_parallel, self.wire = cut_dim, context.sequence_parallel, context.wire
        self.weight = context.parameter(*shape)
        mark_tensor_parallel(self.weight, cut_dim)
        self.cache = CodeCache(self.policy, role, self._with_scales)
        num_groups, is_shared = split_groups(self.policy.groups, self.groups.tp.size())
        self.reduce_group = self.groups.tp if is_shared else None
        self.scale_ids_O = group_ids(projection_O, num_groups).to(context.device)
        self.num_scales = int(self.scale_ids_O.max()) + 1

    def cuts(self) -> dict:
        """The weight is split along its output rows."""
        return {"weight": ((self.cut_dim, self.groups.tp),)}

    def _with_scales(self):
        return absmean_rows(self.weight.flatten(0, -2), self.scale_ids_O, self.num_scales, self.reduce_group)

    def forward(
        self, x_SBH: Quantized | torch.Tensor, down: DownInput | None = None, sub_norm: SubNorm | None = None
    ) -> torch.Tensor | Quantized:
        """Multiply [S, B, H] (or this rank's [S/tp, B, H] under sequence parallelism) into [S, B, O].

        Args:
            x_SBH: quantized, or to be quantized here.
            down: what makes down's input [S, B, F] of gate and up, which is then returned; None returns the product.
            sub_norm: in front of down; None without one.
        """
        if not self.policy.is_ternary:
            return PlainColumnProduct.apply(x_SBH, self.weight.flatten(0, -2), self.groups.tp, self.sequence_parallel)
        if down is None:
            return _ColumnProduct.apply(*self._product(x_SBH))
        gain_F = None if sub_norm is None else sub_norm()
        return Quantized(*_ActivatedProduct.apply(*self._product(x_SBH), gain_F, down))

    def _product(self, x_SBH: Quantized | torch.Tensor) -> tuple:
        """What the autograd functions multiply, and how its codes travel."""
        if isinstance(x_SBH, torch.Tensor):
            x_SBH = quantize_rows(x_SBH, self.role, self.policy)
        operands = self.cache.operands(x_SBH.codes_TD.dtype, self.policy.is_backward_8bit)
        wire = CodeWire(self.wire, self.policy.act_format(self.role)) if self.sequence_parallel else None
        return *x_SBH, self.weight, operands, self.groups.tp, wire


def group_ids(projection_O: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Number the scales of output rows: rows of one projection are cut, in order, into ``num_groups`` equal groups."""
    ids = torch.empty_like(projection_O)
    for projection in projection_O.unique().tolist():
        rows = (projection_O == projection).nonzero().squeeze(1)
        ids[rows] = projection * num_groups + torch.arange(num_groups).repeat_interleave(len(rows) // num_groups)
    return ids


class _ColumnProduct(torch.autograd.Function):
    """Gather codes and scales, multiply; the backward gathers the codes again. Without a wire nothing is gathered."""

    @staticmethod
    def forward(ctx, carrier_SBH, codes_SBH, scale_SB1, weight, operands, group, wire: CodeWire | None):
        ctx.save_for_backward(codes_SBH, scale_SB1)
        return _gather_and_multiply(ctx, carrier_SBH, codes_SBH, scale_SB1, weight, operands, group, wire)

    @staticmethod
    def backward(ctx, grad_SBO):
        x = gathered_tokens(*ctx.saved_tensors, ctx.group, ctx.wire)
        grad_x_TH, grad_weight = gradients(grad_SBO.flatten(0, -2), *x, ctx.operands, is_column=True)
        grad_x_SBH = _sum_of_slice(ctx, grad_x_TH.view(*grad_SBO.shape[:-1], -1))
        return grad_x_SBH, None, None, into_main_grad(ctx.weight, grad_weight), *[None] * 3


def _gather_and_multiply(ctx, carrier_SBH, codes_SBH, scale_SB1, weight, operands, group, wire) -> torch.Tensor:
    """The product [S, B, O]; ``ctx`` keeps what the backward needs beside tensors."""
    ctx.group, ctx.wire, ctx.operands, ctx.weight = group, wire, operands, weight
    codes_TH, scale_T1 = gathered_tokens(codes_SBH, scale_SB1, group, wire)
    y_TO = scaled_product(codes_TH, scale_T1, operands, carrier_SBH.dtype)
    return y_TO.view(-1, *codes_SBH.shape[1:-1], y_TO.shape[-1])


def gathered_tokens(
    codes_SBH: torch.Tensor, scale_SB1: torch.Tensor, group: dist.ProcessGroup, wire: CodeWire | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [T, H] and scales [T, 1] of every rank's slice of the sequence; without a wire, of this rank's."""
    if wire is not None:
        sent = gather_first_dim(wire.sent(codes_SBH), group)
        codes_SBH, scale_SB1 = wire.received(sent, codes_SBH), gather_first_dim(scale_SB1, group)
    return codes_SBH.flatten(0, -2), scale_SB1.flatten(0, -2)


def _sum_of_slice(ctx, grad_SBH: torch.Tensor) -> torch.Tensor:
    """The adjoint of the gather: the gradient of this rank's input."""
    return sum_over_ranks(grad_SBH, ctx.group, scatter=ctx.wire is not None)


class _ActivatedProduct(torch.autograd.Function):
    """``_ColumnProduct`` of gate and up, and the quantized input of down; the backward activates (multiplies) again."""

    @staticmethod
    def forward(
        ctx,
        carrier_SBH,
        codes_SBH,
        scale_SB1,
        weight,
        operands,
        group,
        wire: CodeWire | None,
        gain_F,
        down: DownInput,
    ):
        gate_up_SB2F = _gather_and_multiply(ctx, carrier_SBH, codes_SBH, scale_SB1, weight, operands, group, wire)
        codes_SBF, scale_SBG, rstd_SBG = down.quantize(gate_up_SB2F, gain_F)
        ctx.num_groups = down.num_groups
        source_SB2F = gate_up_SB2F if down.is_source_kept else None
        ctx.save_for_backward(codes_SBH, scale_SB1, source_SB2F, gain_F, rstd_SBG)
        without_code_gradients(ctx, codes_SBF, scale_SBG)
        return stand_in(gate_up_SB2F, codes_SBF.shape), codes_SBF, scale_SBG

    @staticmethod
    def backward(ctx, grad_SBF, *unused):
        codes_SBH, scale_SB1, source_SB2F, gain_F, rstd_SBG = ctx.saved_tensors
        product = *gathered_tokens(codes_SBH, scale_SB1, ctx.group, ctx.wire), ctx.operands
        kept = source_SB2F is not None
        gate_up_T2F = source_SB2F.flatten(0, -2) if kept else scaled_product(*product, grad_SBF.dtype)
        activation = gate_up_T2F, gain_F, None if rstd_SBG is None else rstd_SBG.flatten(0, -2)
        dy_TF = grad_SBF.flatten(0, -2)
        grad_x_TH, grad_weight, grad_gain_F = activated_gradients(dy_TF, *activation, *product, ctx.num_groups)
        grad_x_SBH = _sum_of_slice(ctx, grad_x_TH.view(*grad_SBF.shape[:-1], -1))
        grad_gain_F = None if gain_F is None else grad_gain_F.to(gain_F.dtype)
        return grad_x_SBH, None, None, into_main_grad(ctx.weight, grad_weight), *[None] * 3, grad_gain_F, None


class RowBitLinear(torch.nn.Module, ShardedParameters):
    """Linear whose input features are split over tensor-parallel ranks (o, down), with its sub-norm in front.

    Args:
        num_outputs: rows of the weight (H).
        num_inputs: input features on this rank (F).
        role: o or down.
        context: model, policy and groups.
        activation: applied to the input first, which then has gate and up side by side (2F); None for o.
    """

    def __init__(
        self,
        num_outputs: int,
        num_inputs: int,
        role: str,
        context: LayerContext,
        activation: Activation | None = None,
    ):
        super().__init__()
        self.groups, self.policy, self.role = context.groups, context.policy, role
        self.sequence_parallel, self.activation = context.sequence_parallel, activation
        self.sub_norm = SubNorm(num_inputs, context) if context.model.sub_norm else None
        self.weight = context.parameter(num_outputs, num_inputs)
        mark_tensor_parallel(self.weight, dim=1)
        self.cache = CodeCache(self.policy, role, self._with_scales)
        self.num_groups, is_shared = split_groups(self.policy.groups, self.groups.tp.size())
        self.reduce_group = self.groups.tp if is_shared else None
        self.is_source_kept = context.recompute is not Recompute.ffn

    def cuts(self) -> dict:
        """The weight is split along its input columns."""
        return {"weight": ((1, self.groups.tp),)}

    def _with_scales(self):
        return absmean_columns(self.weight, self.num_groups, self.reduce_group)

    def whole_down_input(self) -> DownInput | None:
        """What makes this linear's input of gate and up in front of it; None where it is made here."""
        is_whole = self.policy.is_ternary and self.reduce_group is None
        if not is_whole or self.activation is not Activation.relu2_glu:
            return None
        eps = 0.0 if self.sub_norm is None else self.sub_norm.eps
        return DownInput(eps, self.policy, self.num_groups, self.is_source_kept)

    def forward(self, x_SBF: Quantized | torch.Tensor) -> torch.Tensor:
        """Multiply features [S, B, F] (or 2F), add over ranks: [S, B, H], or [S/tp, B, H] (sequence parallel)."""
        group, is_scattered, deterministic = self.groups.tp, self.sequence_parallel, self.policy.deterministic
        if not self.policy.is_ternary:
            x_SBF = self._activated(x_SBF)
            x_SBF = x_SBF if self.sub_norm is None else self.sub_norm(x_SBF)
            return PlainRowProduct.apply(x_SBF, self.weight, group, is_scattered, deterministic)
        operands = self.cache.operands(torch.int8, self.policy.is_backward_8bit)
        x_SBF = x_SBF if isinstance(x_SBF, Quantized) else self._quantized(x_SBF)
        return _RowProduct.apply(*x_SBF, self.weight, operands, group, self.reduce_group, is_scattered, deterministic)

    def _activated(self, x_SBF: torch.Tensor) -> torch.Tensor:
        return x_SBF if self.activation is None else gated_activation(self.activation, x_SBF)

    def _quantized(self, x_SBF: torch.Tensor) -> Quantized:
        """Activation, sub-norm and quantization; the last two in one kernel where this rank holds whole groups."""
        x_SBF, where = self._activated(x_SBF), (self.role, self.policy, self.num_groups)
        if self.sub_norm is not None and self.reduce_group is None:
            return normalize_groups(x_SBF, self.sub_norm(), self.sub_norm.eps, *where)
        return quantize_groups(x_SBF if self.sub_norm is None else self.sub_norm(x_SBF), *where, self.reduce_group)


class _RowProduct(torch.autograd.Function):
    """Multiply this rank's groups, add over ranks. One group over all ranks: add integers, scale after."""

    @staticmethod
    def forward(
        ctx, carrier_SBF, codes_SBF, scale_SBG, weight, operands, group, reduce_group, sequence_parallel, deterministic
    ):
        ctx.group, ctx.sequence_parallel, ctx.operands, ctx.weight = group, sequence_parallel, operands, weight
        ctx.save_for_backward(codes_SBF, scale_SBG)
        lead, dtype = carrier_SBF.shape[:-1], carrier_SBF.dtype
        codes_TF = codes_SBF.flatten(0, -2)
        if reduce_group is None:
            wire = scale_SBG.dtype if deterministic else dtype
            y_TH = scaled_product(codes_TF, scale_SBG.flatten(0, -2), operands, wire)
            y_SBH = y_TH.view(*lead, -1)
            return sum_over_ranks(y_SBH, group, scatter=sequence_parallel, deterministic=deterministic).to(dtype)
        sums_SBH = code_matmul(codes_TF, operands.rows).view(*lead, -1)
        sums_SBH = sum_over_ranks(sums_SBH, group, scatter=sequence_parallel)
        scale_SB1 = scale_SBG.chunk(group.size())[group.rank()] if sequence_parallel else scale_SBG
        return (sums_SBH.to(scale_SB1.dtype) * scale_SB1 * operands.scale).to(dtype)

    @staticmethod
    def backward(ctx, grad_SBH):
        codes_TF, scale_TG = (saved.flatten(0, -2) for saved in ctx.saved_tensors)
        if ctx.sequence_parallel:
            grad_SBH = gather_first_dim(grad_SBH, ctx.group)
        grad_TF, grad_weight = gradients(grad_SBH.flatten(0, -2), codes_TF, scale_TG, ctx.operands, is_column=False)
        return grad_TF.view(*grad_SBH.shape[:-1], -1), None, None, into_main_grad(ctx.weight, grad_weight), *[None] * 5
