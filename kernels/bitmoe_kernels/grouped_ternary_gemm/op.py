"""Public entries of the grouped products, for rows sorted by expert.

Codes of 8 bits with scales multiply on INT8 or FP8 tensor cores (``ends_E`` on the device, no size known to the host).
Floating-point products take torch's grouped kernel on GPUs, for bfloat16 only, and the loop over experts elsewhere,
which waits for a GPU to learn the ends. Sums of codes without scales take that loop in fp32, where they are exact.
"""

import torch

from bitmoe_kernels.grouped_ternary_gemm.float8_matmul import grouped_float8_matmul
from bitmoe_kernels.grouped_ternary_gemm.reference import (
    grouped_matmul_reference,
    grouped_outer_reference,
    grouped_scaled_code_matmul_reference,
)
from bitmoe_kernels.ternary_gemm.op import CODE_DTYPES, check_contracted, padded_groups
from bitmoe_kernels.validation import check_groups

# Shapes: R = rows (token copies, sorted by expert), E = experts, K = contracted features, N = output features,
#         I = inputs, O = outputs of the linear, G = groups of inputs.


def multiplies_without_wait(dtype: torch.dtype, *widths: int) -> bool:
    """Whether a GPU multiplies rows of these widths in torch's grouped kernel; else the host waits to learn the ends.

    The kernel needs bfloat16, and rows of a multiple of 16 bytes.
    """
    return dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths)


def _use_grouped_kernel(tensor: torch.Tensor, *widths: int) -> bool:
    """On CUDA, what it takes; and any row at all."""
    return tensor.is_cuda and len(tensor) > 0 and multiplies_without_wait(tensor.dtype, *widths)


def grouped_matmul(x_RK: torch.Tensor, w_EKN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Multiply each expert's rows with its own matrix.

    Args:
        x_RK: rows sorted by expert, [R, K].
        w_EKN: one matrix per expert, [E, K, N], same dtype.
        ends_E: int32 [E], where each expert's rows end; the last is R.

    Returns:
        [R, N], in the dtype of x_RK.
    """
    if _use_grouped_kernel(x_RK, x_RK.shape[1], w_EKN.shape[2]):
        return torch._grouped_mm(x_RK, w_EKN, offs=ends_E)
    return grouped_matmul_reference(x_RK, w_EKN, ends_E)


def grouped_outer(x_RK: torch.Tensor, y_RN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Contract each expert's rows: x^T y per expert, [E, K, N]; zeros for experts without rows.

    Args:
        x_RK: rows sorted by expert, [R, K].
        y_RN: rows in the same order and dtype, [R, N].
        ends_E: int32 [E], where each expert's rows end; the last is R.
    """
    if _use_grouped_kernel(x_RK, x_RK.shape[1], y_RN.shape[1]):
        return torch._grouped_mm(x_RK.T, y_RN, offs=ends_E)
    return grouped_outer_reference(x_RK, y_RN, ends_E)


def grouped_code_matmul(x_RK: torch.Tensor, w_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Multiply each expert's activation codes with its ternary codes.

    Args:
        x_RK: activation codes sorted by expert, int8 [R, K].
        w_ENK: weight codes in {-1, 0, 1}, int8 [E, N, K].
        ends_E: int32 [E], where each expert's rows end; the last is R.

    Returns:
        The integer sums as float32, [R, N].

    Raises:
        TypeError: codes that are not int8.
    """
    if x_RK.dtype != torch.int8 or w_ENK.dtype != torch.int8:
        raise TypeError(f"codes must be int8, got {x_RK.dtype} and {w_ENK.dtype}")
    return grouped_matmul(x_RK.float(), w_ENK.float().transpose(1, 2), ends_E)


def check_ends(ends_E: torch.Tensor) -> None:
    """Raise unless these are the ends of one expert's rows or more, int32 [E]."""
    if ends_E.dtype != torch.int32:
        raise TypeError(f"ends must be int32, got {ends_E.dtype}: use counts.cumsum(0, dtype=torch.int32)")
    if ends_E.dim() != 1 or not len(ends_E):
        raise ValueError(f"ends of shape {list(ends_E.shape)} must be [E]: one end for each expert")


@torch.no_grad()
def grouped_scaled_code_matmul(
    x_codes_RI: torch.Tensor,
    x_scale_RG: torch.Tensor,
    w_codes_EOI: torch.Tensor,
    w_scale: torch.Tensor,
    ends_E: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Forward of the experts' ternary linears: ``scaled_code_matmul`` for each expert's rows (README eq. 1).

    int8 codes give the reference's bits on every device. e4m3 codes (INT4 or FP4 activations) have exact sums too, and
    may differ in the last bit of the output. On a GPU, groups whose size is no multiple of 16 are copied into
    padded storage first.

    Args:
        x_codes_RI: activation codes [R, I], int8 or e4m3.
        x_scale_RG: fp32 [R, G]; G equal blocks of the I inputs.
        w_codes_EOI: ternary codes [E, O, I] of the same type.
        w_scale: fp32; for G = 1 one scale [E, 1] or one per output [E, O], else one per group [E, G].
        ends_E: int32 [E], where each expert's rows end.
        out_dtype: of the result; e4m3 codes on a GPU give bf16 only.

    Returns:
        [R, O]; rows past ``ends_E[-1]`` are undefined.

    Raises:
        TypeError: types of codes that differ or are neither int8 nor e4m3, or ends that are not int32.
        ValueError: shapes that do not fit; scales that are not fp32; e4m3 codes with G > 1, or on a GPU with another
            ``out_dtype``.
    """
    num_groups = _check_forward(x_codes_RI, x_scale_RG, w_codes_EOI, w_scale, ends_E)
    num_rows, (num_experts, num_outputs, _) = len(x_codes_RI), w_codes_EOI.shape
    is_float8 = x_codes_RI.dtype == torch.float8_e4m3fn
    if is_float8 and (num_groups > 1 or (x_codes_RI.is_cuda and out_dtype != torch.bfloat16)):
        raise ValueError(f"e4m3 codes need one group and bf16 output, got {num_groups} and {out_dtype}: use int8")
    w_scale_EOG = (w_scale.unsqueeze(1) if num_groups > 1 else w_scale.unsqueeze(2)).expand(-1, num_outputs, -1)
    if not x_codes_RI.is_cuda:
        return grouped_scaled_code_matmul_reference(x_codes_RI, x_scale_RG, w_codes_EOI, w_scale_EOG, ends_E, out_dtype)
    x_codes_RI = padded_groups(x_codes_RI, num_groups)
    w_codes_EOI = padded_groups(w_codes_EOI.flatten(0, 1), num_groups).unflatten(0, (num_experts, num_outputs))
    if is_float8:
        w_scale_EO = w_scale_EOG.squeeze(2)
        return grouped_float8_matmul(x_codes_RI, x_scale_RG, w_codes_EOI, w_scale_EO, ends_E, fast_accum=False)
    from bitmoe_kernels.grouped_ternary_gemm import triton_kernels

    y_RO = x_codes_RI.new_empty(num_rows, num_outputs, dtype=out_dtype)
    group_size = x_codes_RI.shape[1] // num_groups
    triton_kernels.grouped_matmul(x_codes_RI, x_scale_RG, w_codes_EOI, w_scale_EOG, ends_E, group_size, y_RO)
    return y_RO


def _check_forward(x_codes_RI, x_scale_RG, w_codes_EOI, w_scale, ends_E) -> int:
    """Raise where the operands do not fit; the number of groups."""
    check_ends(ends_E)
    if x_codes_RI.dtype not in CODE_DTYPES or w_codes_EOI.dtype != x_codes_RI.dtype:
        raise TypeError(f"codes must all be int8 or all float8_e4m3fn, got {x_codes_RI.dtype} and {w_codes_EOI.dtype}")
    if x_codes_RI.dim() != 2 or w_codes_EOI.dim() != 3 or len(w_codes_EOI) != len(ends_E):
        raise ValueError(
            f"codes of shapes {list(x_codes_RI.shape)} and {list(w_codes_EOI.shape)} must be [R, I] and "
            f"[{len(ends_E)}, O, I]"
        )
    check_contracted(x_codes_RI, w_codes_EOI)
    num_rows, num_inputs = x_codes_RI.shape
    if x_scale_RG.dtype != torch.float32 or x_scale_RG.dim() != 2 or len(x_scale_RG) != num_rows:
        raise ValueError(f"x_scale must be fp32 [{num_rows}, groups], got {x_scale_RG.dtype} {list(x_scale_RG.shape)}")
    num_groups = x_scale_RG.shape[1]
    check_groups(num_groups, num_inputs, "inputs")
    num_experts, num_outputs, _ = w_codes_EOI.shape
    fits = [(num_experts, size) for size in ({1, num_outputs} if num_groups == 1 else {num_groups})]
    if w_scale.dtype != torch.float32 or w_scale.shape not in fits:
        raise ValueError(
            f"w_scale must be fp32 of shape {' or '.join(map(str, sorted(fits)))}, got {w_scale.dtype} "
            f"{list(w_scale.shape)} for {num_groups} groups"
        )
    return num_groups
