"""Ternary codes of a parameter, made once per parameter value and kept for all its uses.

Two layouts of scales cover every linear. Column-parallel weights have one scale per logical projection and group of
output rows (q, k and v, or gate and up, never share one); row-parallel weights have one per group of input columns.
Where a group spans ranks (G = 1 with tensor parallelism) the sums of |w| are added over them in fp64 before the
scale is rounded once, so the codes do not depend on the layout.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from bitmoe.quant.policy import QuantPolicy
from bitmoe_kernels.weight_quant import absmean_scale, absmean_sums, ternary_codes

# Shapes: O = output rows, I = input columns, E = experts (optional leading dim), G = groups on this rank.


class CodeCache:
    """Codes and scale of one parameter, made again only when the policy's epoch moved.

    Args:
        policy: whose epoch tells that parameters changed.
        role: linear role the codes are counted under.
        make: returns (codes, scale) from the parameter's present value.
    """

    def __init__(self, policy: QuantPolicy, role: str, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]):
        self._policy, self._role, self._make = policy, role, make
        self._epoch, self._codes, self._scale = -1, None, None

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The int8 codes and fp32 scale of the parameter's present value."""
        if self._epoch != self._policy.epoch:
            former = self._codes
            with torch.no_grad():
                self._codes, self._scale = self._make()
            self._policy.statistics.add_weights(self._role, self._codes, former)
            self._epoch = self._policy.epoch
        return self._codes, self._scale


def ternarize_rows(
    w_OI: torch.Tensor, scale_ids_O: torch.Tensor, num_scales: int, reduce_group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ternarize a column-parallel weight whose output rows belong to several scales.

    Args:
        w_OI: weight [O, I] (this rank's rows).
        scale_ids_O: which scale each row belongs to, int64 [O]; with grouped queries q has more rows than k or v.
        num_scales: number of different ids.
        reduce_group: ranks that share these scales, or None if this rank owns their rows alone.

    Returns:
        codes int8 [O, I] and the scale of each row, fp32 [O].
    """
    num_rows, num_columns = w_OI.shape
    row_sums = absmean_sums(w_OI, groups=num_rows, dim=0)
    row_counts = torch.full_like(row_sums, num_columns)
    sums, counts = (x.new_zeros(num_scales).index_add_(0, scale_ids_O, x) for x in (row_sums, row_counts))
    if reduce_group is not None:
        dist.all_reduce(sums, group=reduce_group)
        counts *= reduce_group.size()
    scale_O = absmean_scale(sums / counts, count=1)[scale_ids_O]
    return ternary_codes(w_OI, scale_O, dim=0), scale_O


def ternarize_columns(
    w_EOI: torch.Tensor, groups: int, reduce_group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ternarize a row-parallel weight (or one per expert) by groups of its input columns.

    Args:
        w_EOI: weight [O, I] or [E, O, I] (this rank's columns).
        groups: groups on this rank.
        reduce_group: ranks that share the one group, or None.

    Returns:
        codes int8 like w_EOI and scale fp32 [G] or [E, G].
    """
    sums = absmean_sums(w_EOI, groups=groups, dim=1)
    count = w_EOI.shape[-2] * w_EOI.shape[-1] // groups
    if reduce_group is not None:
        dist.all_reduce(sums, group=reduce_group)
        count *= reduce_group.size()
    scale = absmean_scale(sums, count)
    return ternary_codes(w_EOI, scale, dim=1), scale
