"""Grouped products as a loop over experts: the truth, and the path of the CPU.

Rows are sorted by expert; ``counts_E`` says how many rows each expert has (zero is legal).
"""

import torch

# Shapes: R = rows (token copies, sorted by expert), E = experts, K = contracted features, N = output features.


def grouped_matmul_reference(x_RK: torch.Tensor, w_EKN: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Multiply each expert's rows with its own matrix.

    Args:
        x_RK: rows sorted by expert, [R, K].
        w_EKN: one matrix per expert, [E, K, N].
        counts_E: rows of each expert, int64 [E] on the CPU; sums to R.

    Returns:
        [R, N], in the dtype of x_RK.
    """
    y_RN = x_RK.new_empty(x_RK.shape[0], w_EKN.shape[2])
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        rows = slice(start, start + count)
        torch.matmul(x_RK[rows], w_EKN[expert], out=y_RN[rows])
        start += count
    return y_RN


def grouped_outer_reference(x_RK: torch.Tensor, y_RN: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Contract each expert's rows: x^T y, the weight gradient of a grouped product.

    Args:
        x_RK: rows sorted by expert, [R, K].
        y_RN: rows in the same order, [R, N].
        counts_E: rows of each expert, int64 [E] on the CPU.

    Returns:
        [E, K, N]; zeros for experts without rows.
    """
    out_EKN = x_RK.new_empty(len(counts_E), x_RK.shape[1], y_RN.shape[1])
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        rows = slice(start, start + count)
        torch.matmul(x_RK[rows].T, y_RN[rows], out=out_EKN[expert])
        start += count
    return out_EKN
