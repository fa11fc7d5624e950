"""Public entries of the grouped products: torch's grouped kernel on GPUs, the loop over experts elsewhere.

``torch._grouped_mm`` takes bfloat16 only and rounds its result to bfloat16, so it serves bfloat16 models; there a sum
of codes is rounded once (2**-9 relative) before its scales, where the float32 path keeps it exact.
"""

import torch

from bitmoe_kernels.grouped_ternary_gemm.reference import grouped_matmul_reference, grouped_outer_reference

# Shapes: R = rows (token copies, sorted by expert), E = experts, K = contracted features, N = output features.


def _use_grouped_kernel(tensor: torch.Tensor, *widths: int) -> bool:
    """The grouped kernel needs bfloat16 on CUDA, rows of a multiple of 16 bytes, and any row at all."""
    is_bfloat16 = tensor.is_cuda and tensor.dtype == torch.bfloat16
    return is_bfloat16 and len(tensor) > 0 and all(width % 8 == 0 for width in widths)


def _ends(counts_E: torch.Tensor, device: torch.device) -> torch.Tensor:
    return counts_E.cumsum(0).to(device=device, dtype=torch.int32)


def grouped_matmul(x_RK: torch.Tensor, w_EKN: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Multiply each expert's rows with its own matrix.

    Args:
        x_RK: rows sorted by expert, [R, K].
        w_EKN: one matrix per expert, [E, K, N], same dtype.
        counts_E: rows of each expert, int64 [E]; sums to R.

    Returns:
        [R, N], in the dtype of x_RK.
    """
    if _use_grouped_kernel(x_RK, x_RK.shape[1], w_EKN.shape[2]):
        return torch._grouped_mm(x_RK, w_EKN, offs=_ends(counts_E, x_RK.device))
    return grouped_matmul_reference(x_RK, w_EKN, counts_E)


def grouped_outer(x_RK: torch.Tensor, y_RN: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Contract each expert's rows: x^T y per expert, [E, K, N]; zeros for experts without rows.

    Args:
        x_RK: rows sorted by expert, [R, K].
        y_RN: rows in the same order and dtype, [R, N].
        counts_E: rows of each expert, int64 [E]; sums to R.
    """
    if _use_grouped_kernel(x_RK, x_RK.shape[1], y_RN.shape[1]):
        return torch._grouped_mm(x_RK.T, y_RN, offs=_ends(counts_E, x_RK.device))
    return grouped_outer_reference(x_RK, y_RN, counts_E)


def grouped_code_matmul(
    x_RK: torch.Tensor, w_ENK: torch.Tensor, counts_E: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Multiply each expert's activation codes with its ternary codes.

    Args:
        x_RK: activation codes sorted by expert, int8 [R, K].
        w_ENK: weight codes in {-1, 0, 1}, int8 [E, N, K].
        counts_E: rows of each expert, int64 [E]; sums to R.
        dtype: float32 for exact sums; bfloat16 rounds each sum once and uses the GPU's grouped kernel.

    Returns:
        The integer sums, [R, N] in ``dtype``.

    Raises:
        TypeError: codes that are not int8.
    """
    if x_RK.dtype != torch.int8 or w_ENK.dtype != torch.int8:
        raise TypeError(f"codes must be int8, got {x_RK.dtype} and {w_ENK.dtype}")
    return grouped_matmul(x_RK.to(dtype), w_ENK.to(dtype).transpose(1, 2), counts_E)
