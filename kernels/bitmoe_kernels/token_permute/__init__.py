"""Copies of tokens in the order of their experts, and sums of them back, without a wait for the GPU."""

from bitmoe_kernels.token_permute.op import permute, permute_probs, permute_probs_backward, plan_rows, sum_rows
from bitmoe_kernels.token_permute.reference import RowPlan

__all__ = ["RowPlan", "permute", "permute_probs", "permute_probs_backward", "plan_rows", "sum_rows"]
