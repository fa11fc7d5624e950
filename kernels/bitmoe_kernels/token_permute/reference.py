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
    expert_R: torch.Tensor
    """int32 [R]: the expert of each row."""
    ends_E: torch.Tensor
    """int32 [E]: rows of this expert and of those in front of it."""


def plan_rows_reference(routing_map_TE: torch.Tensor, topk: int) -> RowPlan:
    """Equation 1."""
    expert_R, source_R = routing_map_TE.T.nonzero(as_tuple=True)
    row_TK = source_R.argsort(stable=True).view(-1, topk)
    ends_E = routing_map_TE.sum(0).cumsum(0)
    return RowPlan(source_R.int(), row_TK.int(), expert_R.int(), ends_E.int())


def permute_reference(x_TH: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """Equation 2: [R, H]."""
    return x_TH.contiguous().view(torch.uint8).index_select(0, plan.source_R).view(x_TH.dtype)


def sum_rows_reference(dx_RH: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """Equation 3: [T, H]."""
    dtype = torch.promote_types(dx_RH.dtype, torch.float32)
    total_TH = torch.zeros(len(plan.row_TK), dx_RH.shape[1], dtype=dtype, device=dx_RH.device)
    for row_T in plan.row_TK.T:
        total_TH += dx_RH.index_select(0, row_T).to(dtype)
    return total_TH.to(dx_RH.dtype)


def permute_probs_reference(probs_TE: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """Equation 4: [R, 1]."""
    return probs_TE[plan.source_R.long(), plan.expert_R.long()].unsqueeze(1)


def permute_probs_backward_reference(dprobs_R1: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """Equation 5: [T, E]."""
    dprobs_TE = dprobs_R1.new_zeros(len(plan.row_TK), len(plan.ends_E))
    dprobs_TE[plan.source_R.long(), plan.expert_R.long()] = dprobs_R1.squeeze(1)
    return dprobs_TE
