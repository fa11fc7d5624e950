"""Ternary codes of a parameter, made once per parameter value and kept for all its uses.

Two layouts of scales cover every linear. Column-parallel weights have one scale per logical projection and group of
output rows (q, k and v, or gate and up, never share one); row-parallel weights have one per group of input columns.
Where a group spans ranks (G = 1 with tensor parallelism) the sums of |w| are added over them in fp64 before the
scale is rounded once, so the codes do not depend on the layout.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from bitmoe.quant.policy import QuantPolicy
from bitmoe_kernels.weight_quant import (
    TernaryOperands,
    absmean_operands,
    absmean_scale,
    absmean_sums,
    absmean_sums_by_id,
    ternary_operands,
)

# Shapes: O = output rows, P = O padded with zeros to a multiple of 16, I = input columns, E = experts (optional leading
#         dim), G = groups on this rank.


class WeightOperands(NamedTuple):
    """Codes of a weight as the products of its linear take them; ``w ~ codes * scale``."""

    rows: torch.Tensor
    """int8 or e4m3 [O, I] or [E, O, I]: of the forward."""
    columns: torch.Tensor | None
    """e4m3 [I, P] or [E, I, P]: of the 8-bit input gradient, where asked for."""
    scale: torch.Tensor
    """fp32, of each output row [O] or [E, O], or of each group of input columns [G] or [E, G]."""


class OwnBlocks(NamedTuple):
    """A weight whose scales are each of one block, all of it on this rank."""

    weight_EOI: torch.Tensor
    """[O, I], or one per expert [E, O, I]."""
    groups: int
    """Equal blocks of a matrix."""
    dim: int
    """0 for blocks of rows, 1 of columns."""


class CodeCache:
    """Codes and scale of one parameter, made again only when the policy's epoch moved or another layout is wanted.

    On GPUs the codes of a new value take the memory of the former: nothing may keep codes beyond a step.
    ``epoch`` is that of the parameter value the codes were made of.

    Args:
        policy: whose epoch tells that parameters changed.
        role: linear role the codes are counted under.
        make: returns the parameter's present value and its scales, or how it is cut into blocks that this rank scales
            alone, as the functions ``absmean_...`` do.
    """

    def __init__(
        self, policy: QuantPolicy, role: str, make: Callable[[], "tuple[torch.Tensor, torch.Tensor] | OwnBlocks"]
    ):
        self._policy, self._role, self._make = policy, role, make
        self.epoch = -1
        self._codes: TernaryOperands | None = None
        self._scale: torch.Tensor | None = None
        policy.register_cache(self)

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The int8 codes and fp32 scale of the parameter's present value."""
        rows, _, scale = self.operands()
        return rows, scale

    def operands(self, row_dtype: torch.dtype = torch.int8, with_columns: bool = False) -> WeightOperands:
        """The codes of the parameter's present value.

        One layout is kept: callers that ask for different types of rows in turns have them made every time.

        Args:
            row_dtype: int8 or e4m3.
            with_columns: transposed codes, too.
        """
        is_new = self.epoch != self._policy.epoch
        if is_new or not self._holds(row_dtype, with_columns):
            statistics = self._policy.statistics
            is_counted = is_new and statistics.counts_weights
            with torch.no_grad():
                scale, self._codes = self._made(row_dtype, with_columns, is_counted)
            if self._scale is None:
                self._scale = scale.flatten(-2)
            else:
                # At one address, for recorded passes.
                self._scale.view(scale.shape).copy_(scale)
            if is_counted:
                statistics.add_weights(self._role, self._codes.counts)
            self.epoch = self._policy.epoch
        return WeightOperands(self._codes.rows, self._codes.columns, self._scale)

    def _made(
        self, row_dtype: torch.dtype, with_columns: bool, is_counted: bool
    ) -> tuple[torch.Tensor, TernaryOperands]:
        """Scales of the present value, each as often as it is used (fp32 [..., S, repeats]), and codes."""
        layout, made = (row_dtype, with_columns, self._codes, is_counted), self._make()
        if isinstance(made, OwnBlocks):
            scale, codes = absmean_operands(*made, *layout)
            repeats = made.weight_EOI.shape[-2] // made.groups if made.dim == 0 else 1
            return scale.unsqueeze(-1).expand(*scale.shape, repeats), codes
        weight, scale = made
        dim, scale = 1 if scale.shape[-2] == 1 else 0, scale.flatten(-2)
        return scale.unsqueeze(-1), ternary_operands(weight, scale, dim, *layout)

    def _holds(self, row_dtype: torch.dtype, with_columns: bool) -> bool:
        return self._codes.rows.dtype == row_dtype and not (with_columns and self._codes.columns is None)


def absmean_rows(
    w_OI: torch.Tensor, scale_ids_O: torch.Tensor, num_scales: int, reduce_group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of a column-parallel weight (or one per expert) whose output rows belong to several scales.

    Args:
        w_OI: weight [O, I] or [E, O, I] (this rank's rows).
        scale_ids_O: which scale each row belongs to, int64 [O], in every expert; with grouped queries q has more rows
            than k or v.
        num_scales: number of different ids.
        reduce_group: ranks that share these scales, or None if this rank owns their rows alone.

    Returns:
        The weight itself and the scale of each row, fp32 [O, 1] or [E, O, 1].
    """
    sums, counts = absmean_sums_by_id(w_OI, scale_ids_O, num_scales)
    if reduce_group is not None:
        dist.all_reduce(sums, group=reduce_group)
        counts = counts * reduce_group.size()
    return w_OI, absmean_scale(sums, counts, scale_ids_O).unsqueeze(-1)


def absmean_columns(
    w_EOI: torch.Tensor, groups: int, reduce_group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of a row-parallel weight (or one per expert) by groups of its input columns.

    Args:
        w_EOI: weight [O, I] or [E, O, I] (this rank's columns).
        groups: groups on this rank.
        reduce_group: ranks that share the one group, or None.

    Returns:
        The weight itself and its scales, fp32 [1, G] or [E, 1, G].
    """
    sums = absmean_sums(w_EOI, groups=groups, dim=1)
    count = w_EOI.shape[-2] * w_EOI.shape[-1] // groups
    if reduce_group is not None:
        dist.all_reduce(sums, group=reduce_group)
        count *= reduce_group.size()
    return w_EOI, absmean_scale(sums, count).unsqueeze(-2)


def absmean_blocks(
    w_EOI: torch.Tensor, groups: int, dim: int, reduce_group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor] | OwnBlocks:
    """Scales of equal blocks of rows (``dim`` 0) or columns (1); those of one rank alone are left to the cache.

    Args:
        w_EOI: weight [O, I] or one per expert [E, O, I] (this rank's part).
        groups: blocks of a matrix on this rank.
        dim: 0 for blocks of rows, 1 of columns.
        reduce_group: ranks that share the blocks, or None.
    """
    if reduce_group is None:
        return OwnBlocks(w_EOI, groups, dim)
    if dim == 1:
        return absmean_columns(w_EOI, groups, reduce_group)
    block_size = w_EOI.shape[-2] // groups
    ids_O = torch.arange(groups, device=w_EOI.device).repeat_interleave(block_size, output_size=w_EOI.shape[-2])
    return absmean_rows(w_EOI, ids_O, groups, reduce_group)
