"""From activations to codes: the input of every quantized linear, by role and format.

A column-parallel input row is whole on every rank, so its one scale needs no communication. A row-parallel input is
split over ranks by quantization groups: each group has its own scale and its own top-K. Where the one group of G = 1
spans ranks, rows are exchanged, quantized whole by the single-rank code, and the codes sent back.
"""

import torch
import torch.distributed as dist

from bitmoe.config.schema import ActFormat
from bitmoe.layers.collectives import features_to_rows, gather_first_dim, rows_to_features
from bitmoe.quant.policy import QuantPolicy
from bitmoe_kernels.act_quant import quantize_fp4, quantize_int4, quantize_int8
from bitmoe_kernels.sparsify import topk_mask

# Shapes: T = tokens (any leading dims), D = features, F = features on this rank, G = groups on this rank.

_QUANTIZERS = {ActFormat.int8: quantize_int8, ActFormat.int4: quantize_int4, ActFormat.fp4: quantize_fp4}


def quantize_whole_rows(x_TD: torch.Tensor, role: str, policy: QuantPolicy) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of rows that are whole on this rank: int8 [..., D] and scale [..., 1]."""
    act_format = policy.act_format(role)
    codes_TD, scale_T1 = _QUANTIZERS[act_format](x_TD)
    keep = policy.keep(role)
    if keep < 1:
        codes_TD = codes_TD * topk_mask(x_TD, keep=keep)
    policy.statistics.add_activations(role, codes_TD, act_format)
    return codes_TD, scale_T1


def quantize_grouped(
    x_TF: torch.Tensor, role: str, policy: QuantPolicy, num_groups: int, exchange_group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a row-parallel input, group by group.

    Args:
        x_TF: activations [T, F] on this rank.
        role: o or down.
        policy: current formats.
        num_groups: groups on this rank.
        exchange_group: ranks the one group is split over (then num_groups is 1), or None.

    Returns:
        codes int8 [T, F] and scale [T, G].
    """
    if exchange_group is None:
        codes_TGF, scale_TG1 = quantize_whole_rows(x_TF.unflatten(-1, (num_groups, -1)), role, policy)
        return codes_TGF.flatten(-2), scale_TG1.squeeze(-1)
    num_tokens = x_TF.shape[0]
    codes_rows, scale_rows = quantize_whole_rows(features_to_rows(x_TF, exchange_group), role, policy)
    codes_TF = rows_to_features(codes_rows, num_tokens, exchange_group)
    return codes_TF, gather_first_dim(scale_rows, exchange_group)[:num_tokens]
