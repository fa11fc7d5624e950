"""Public trip of rows to experts and back on one device: checks, then Triton's kernels on a GPU, else the reference.

Nothing here waits for the GPU or has a size that only it knows. Plain functions: autograd belongs to the layer.
"""

# Shapes: T = tokens, E = experts, K = experts of each token, R = T * K rows, H = features.

import torch

from bitmoe_kernels.dispatch import on_triton_device, runs_triton
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
        return _triton_kernels().sum_rows_triton(dx_RH, plan)
    return reference.sum_rows_reference(dx_RH, plan)


@torch.no_grad()
def permute_probs(probs_TE: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """The routing probability of each row (README eq. 4).

    Args:
        probs_TE: [T, E].
        plan: from :func:`plan_rows`.

    Returns:
        [R, 1] in the dtype of the probabilities.

    Raises:
        TypeError: probabilities that are not floating point.
        ValueError: probabilities that do not fit the plan.
    """
    check_floating(probs_TE, "probs")
    wanted = [len(plan.row_TK), len(plan.ends_E)]
    if list(probs_TE.shape) != wanted:
        raise ValueError(f"probs have shape {list(probs_TE.shape)}: the plan needs {wanted}, [T, E]")
    if on_triton_device(probs_TE):
        return _triton_kernels().permute_probs_triton(probs_TE, plan)
    return reference.permute_probs_reference(probs_TE, plan)


@torch.no_grad()
def permute_probs_backward(dprobs_R1: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """Gradient of :func:`permute_probs` (README eq. 5).

    Args:
        dprobs_R1: gradients of rows' probabilities, [R, 1].
        plan: from :func:`plan_rows`.

    Returns:
        [T, E] in the dtype of the gradients; 0 for experts that a token is not sent to.

    Raises:
        TypeError: gradients that are not floating point.
        ValueError: gradients that do not fit the plan.
    """
    check_floating(dprobs_R1, "dprobs")
    if dprobs_R1.shape != (len(plan.source_R), 1):
        wanted = [len(plan.source_R), 1]
        raise ValueError(f"dprobs have shape {list(dprobs_R1.shape)}: the plan needs {wanted}, [R, 1]")
    if on_triton_device(dprobs_R1):
        return _triton_kernels().permute_probs_backward_triton(dprobs_R1, plan)
    return reference.permute_probs_backward_reference(dprobs_R1, plan)


def _check_counts(routing_map_TE: torch.Tensor, topk: int) -> None:
    """On CPU, raise ValueError for a token that is not sent to ``topk`` experts."""
    if routing_map_TE.device.type != "cpu":
        return
    wrong = (routing_map_TE.sum(1) != topk).nonzero()
    if len(wrong):
        token = int(wrong[0])
        count = int(routing_map_TE[token].sum())
        raise ValueError(f"token {token} goes to {count} experts instead of topk={topk}: route without dropping")


def _check_rows(x_RH: torch.Tensor, name: str, num_rows: int) -> None:
    if x_RH.dim() != 2 or len(x_RH) != num_rows or x_RH.shape[1] == 0:
        raise ValueError(f"{name} has shape {list(x_RH.shape)}: the plan needs [{num_rows}, H] with H >= 1")


def _triton_kernels():
    # Imported at the first use: not every machine has Triton.
    from bitmoe_kernels.token_permute import triton_kernels

    return triton_kernels
