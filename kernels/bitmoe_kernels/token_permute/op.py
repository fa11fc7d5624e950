"""Public trip of rows to experts and back on one device: checks, then Triton's kernels on a GPU, else the reference.

Nothing here waits for the GPU or has a size that only it knows. Plain functions: autograd belongs to the layer.
"""

# Shapes: T = tokens, E = experts, K = experts of each token, R = T * K rows, H = features.

import torch

from bitmoe_kernels.dispatch import on_triton_device, runs_triton, runs_triton_by_row
from bitmoe_kernels.token_permute import reference
from bitmoe_kernels.token_permute.reference import RowPlan
from bitmoe_kernels.validation import check_features, check_floating


@torch.no_grad()
def plan_rows(routing_map_TE: torch.Tensor, topk: int) -> RowPlan:
    """Number the rows of tokens sorted by expert and within an expert by token (README eq. 1).

    Args:
        routing_map_TE: which experts each token goes to, bool [T, E]; exactly ``topk`` in each row.
        topk: K.

    Returns:
        The plan that the other functions take.

    Raises:
        TypeError: a map that is not bool.
        ValueError: shapes that do not fit, or (on CPU) a token with more or fewer experts. On other devices, where
            looking would make the device wait, a surplus is left out and missing entries are 0: the rows are wrong,
            but every index stays inside.
    """
    if routing_map_TE.dtype != torch.bool:
        raise TypeError(f"routing map must be bool, got {routing_map_TE.dtype}: cast it with .bool()")
    if routing_map_TE.dim() != 2 or not 1 <= topk <= routing_map_TE.shape[1]:
        raise ValueError(f"topk={topk} does not fit a routing map of shape {list(routing_map_TE.shape)}: pass [T, E]")
    if on_triton_device(routing_map_TE):
        return _triton_kernels().plan_rows_triton(routing_map_TE, topk)
    _check_counts(routing_map_TE, topk)
    return reference.plan_rows_reference(routing_map_TE, topk)


@torch.no_grad()
def permute(x_TH: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """Copy each token to its rows (README eq. 2).

    Args:
        x_TH: values, codes or scales of any dtype, [T, H].
        plan: from :func:`plan_rows`.

    Returns:
        [R, H] in the dtype of x, bit for bit.

    Raises:
        ValueError: x that does not fit the plan.
    """
    _check_rows(x_TH, "x", len(plan.row_TK))
    permute_rows = _triton_kernels().permute_triton if on_triton_device(x_TH) else reference.permute_reference
    return permute_rows(x_TH, plan)


@torch.no_grad()
def sum_rows(dx_RH: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """Add the rows of each token, the adjoint of :func:`permute` (README eq. 3).

    Args:
        dx_RH: gradients of rows, [R, H].
        plan: from :func:`plan_rows`.

    Returns:
        [T, H] in the dtype of dx, added in fp32 (fp64 for fp64) and rounded once.

    Raises:
        TypeError: gradients that are not floating point.
        ValueError: gradients that do not fit the plan.
    """
    check_features(dx_RH, "dx")
    _check_rows(dx_RH, "dx", len(plan.source_R))
    if runs_triton(dx_RH):
        return _triton_kernels().combine_triton(dx_RH, None, plan)
    return reference.sum_rows_reference(dx_RH, plan)


@torch.no_grad()
def combine(y_RH: torch.Tensor, probs_TK: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """Add the rows of each token, weighted (README eq. 4).

    Args:
        y_RH: experts' outputs, [R, H].
        probs_TK: weight of each row, [T, K], experts ascending as in ``plan.expert_TK``.
        plan: from :func:`plan_rows`.

    Returns:
        [T, H] in the dtype of y, computed in fp32 (fp64 where y or the weights are fp64) and rounded once.

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: tensors that do not fit the plan.
    """
    _check_weighted(y_RH, probs_TK, plan)
    if runs_triton(y_RH) and runs_triton(probs_TK):
        return _triton_kernels().combine_triton(y_RH, probs_TK, plan)
    return reference.combine_reference(y_RH, probs_TK, plan)


@torch.no_grad()
def combine_backward(
    dout_TH: torch.Tensor, y_RH: torch.Tensor, probs_TK: torch.Tensor, plan: RowPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of :func:`combine` (README eq. 5).

    Args:
        dout_TH: gradient of its result, [T, H].
        y_RH: its input, [R, H].
        probs_TK: its weights, [T, K].
        plan: from :func:`plan_rows`.

    Returns:
        dy [R, H] in the dtype of y, and dprobs [T, K] in fp32 (fp64 where y or the weights are fp64).

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: tensors that do not fit the plan.
    """
    _check_weighted(y_RH, probs_TK, plan)
    check_floating(dout_TH, "dout")
    if dout_TH.shape != (len(plan.row_TK), y_RH.shape[1]):
        raise ValueError(f"dout of shape {list(dout_TH.shape)} does not fit y of shape {list(y_RH.shape)}: pass [T, H]")
    if runs_triton_by_row(y_RH) and runs_triton(probs_TK) and runs_triton(dout_TH):
        return _triton_kernels().combine_backward_triton(dout_TH, y_RH, probs_TK, plan)
    return reference.combine_backward_reference(dout_TH, y_RH, probs_TK, plan)


def _check_counts(routing_map_TE: torch.Tensor, topk: int) -> None:
    """On CPU, raise ValueError for a token that is not sent to ``topk`` experts."""
    if routing_map_TE.device.type != "cpu":
        return
    wrong = (routing_map_TE.sum(1) != topk).nonzero()
    if len(wrong):
        token = int(wrong[0])
        count = int(routing_map_TE[token].sum())
        raise ValueError(f"token {token} goes to {count} experts instead of topk={topk}: route without dropping")


def _check_weighted(y_RH: torch.Tensor, probs_TK: torch.Tensor, plan: RowPlan) -> None:
    check_features(y_RH, "y")
    _check_rows(y_RH, "y", len(plan.source_R))
    check_floating(probs_TK, "probs")
    if probs_TK.shape != plan.row_TK.shape:
        raise ValueError(f"probs have shape {list(probs_TK.shape)}: the plan needs {list(plan.row_TK.shape)}, [T, K]")


def _check_rows(x_RH: torch.Tensor, name: str, num_rows: int) -> None:
    if x_RH.dim() != 2 or len(x_RH) != num_rows or x_RH.shape[1] == 0:
        raise ValueError(f"{name} has shape {list(x_RH.shape)}: the plan needs [{num_rows}, H] with H >= 1")


def _triton_kernels():
    # Imported at the first use: not every machine has Triton.
    from bitmoe_kernels.token_permute import triton_kernels

    return triton_kernels
