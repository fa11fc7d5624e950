"""Rows of tokens by expert, and the way back, in plain torch: the truth for every other implementation.

Equation numbers are those of the README. Arguments are not validated here: op.py does that.
"""

# Shapes: T = tokens, E = experts, K = experts of each token, R = T * K rows, H = features.

from typing import NamedTuple

import torch


class RowPlan(NamedTuple):
    """Which row is which token's; rows are sorted by expert and within an expert by token."""

    source_R: torch.Tensor
    """int32 [R]: the token of each row."""
    row_TK: torch.Tensor
    """int32 [T, K]: the rows of each token, experts ascending (README eq. 1)."""
    expert_TK: torch.Tensor
    """int64 [T, K]: their experts, as ``torch.gather`` wants them."""
    expert_R: torch.Tensor
    """int32 [R]: the expert of each row."""
    ends_E: torch.Tensor
    """int32 [E]: rows of this expert and of those in front of it."""


def plan_rows_reference(routing_map_TE: torch.Tensor, topk: int) -> RowPlan:
    """Equation 1."""
    expert_R, source_R = routing_map_TE.T.nonzero(as_tuple=True)
    row_TK = source_R.argsort(stable=True).view(-1, topk)
    ends_E = routing_map_TE.sum(0).cumsum(0)
    return RowPlan(source_R.int(), row_TK.int(), expert_R[row_TK], expert_R.int(), ends_E.int())


def permute_reference(x_TH: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """Equation 2: [R, H]."""
    return x_TH.contiguous().view(torch.uint8).index_select(0, plan.source_R).view(x_TH.dtype)


def sum_rows_reference(dx_RH: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """Equation 3: [T, H]."""
    return combine_reference(dx_RH, torch.ones_like(plan.row_TK, dtype=compute_dtype(dx_RH)), plan)


def combine_reference(y_RH: torch.Tensor, probs_TK: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """Equation 4: [T, H]."""
    dtype = compute_dtype(y_RH, probs_TK)
    total_TH = torch.zeros(len(plan.row_TK), y_RH.shape[1], dtype=dtype, device=y_RH.device)
    for row_T, prob_T in zip(plan.row_TK.T, probs_TK.T, strict=True):
        total_TH += y_RH.index_select(0, row_T).to(dtype) * prob_T.to(dtype)[:, None]
    return total_TH.to(y_RH.dtype)


def combine_backward_reference(
    dout_TH: torch.Tensor, y_RH: torch.Tensor, probs_TK: torch.Tensor, plan: RowPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 5: gradients of y [R, H] in its dtype, and of the probabilities [T, K]."""
    dtype = compute_dtype(y_RH, probs_TK)
    dout_TH = dout_TH.to(dtype)
    dy_RH, dprobs_TK = torch.empty_like(y_RH), torch.empty_like(probs_TK, dtype=dtype)
    for k, row_T in enumerate(plan.row_TK.long().unbind(1)):
        dy_RH[row_T] = (dout_TH * probs_TK[:, k, None].to(dtype)).to(y_RH.dtype)
        dprobs_TK[:, k] = (dout_TH * y_RH[row_T].to(dtype)).sum(1)
    return dy_RH, dprobs_TK


def compute_dtype(*factors: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 where one of the factors is fp64."""
    return torch.float64 if any(factor.dtype == torch.float64 for factor in factors) else torch.float32
