"""Public products of codes: they check their input and pick an exact way for the device.

A float32 sum of integers is exact below 2**24, so K up to 131,072 int8 codes of magnitude 127 multiply exactly in
float32 (CPU) and in bfloat16 with float32 accumulation (GPU: codes of 8 bits are bfloat16 numbers).
The type of the codes picks the tensor cores: int8 codes multiply on INT8, e4m3 codes on FP8.
"""

import torch

from bitmoe_kernels.ternary_gemm.float8_matmul import float8_matmul
from bitmoe_kernels.ternary_gemm.reference import (
    PADDING,
    pad_last,
    padded_length,
    scaled_code_matmul_reference,
    transpose_codes_reference,
)
from bitmoe_kernels.validation import check_groups

# Shapes: B = batch (optional), T = tokens, K = contracted features, N = output features,
#         I = inputs, O = outputs of the linear, G = groups of inputs, R x C = any code matrix, P = R padded.

MAX_CONTRACTED = 2**24 // 128
CODE_DTYPES = (torch.int8, torch.float8_e4m3fn)


def code_matmul(x_BTK: torch.Tensor, w_BNK: torch.Tensor) -> torch.Tensor:
    """Multiply activation codes with weight codes, exactly.

    Args:
        x_BTK: activation codes, int8 [T, K] or [B, T, K].
        w_BNK: weight codes in {-1, 0, 1}, int8 [N, K] or [B, N, K].

    Returns:
        The integer sums as float32, [T, N] or [B, T, N].

    Raises:
        TypeError: codes that are not int8.
        ValueError: K differs, or is too large for exact float32 sums.
    """
    if x_BTK.dtype != torch.int8 or w_BNK.dtype != torch.int8:
        raise TypeError(f"codes must be int8, got {x_BTK.dtype} and {w_BNK.dtype}")
    check_contracted(x_BTK, w_BNK)
    if x_BTK.is_cuda:
        product = torch.mm if x_BTK.dim() == 2 else torch.bmm
        w_BKN = w_BNK.bfloat16().transpose(-1, -2)
        return product(x_BTK.bfloat16(), w_BKN, out_dtype=torch.float32)
    return torch.matmul(x_BTK.float(), w_BNK.float().transpose(-1, -2))


def check_contracted(x: torch.Tensor, w: torch.Tensor) -> None:
    """Raise ValueError unless both last dimensions agree and sums over them are exact in float32."""
    if x.shape[-1] != w.shape[-1] or x.shape[-1] > MAX_CONTRACTED:
        raise ValueError(f"contracted sizes {x.shape[-1]} and {w.shape[-1]} must agree and not exceed {MAX_CONTRACTED}")


@torch.no_grad()
def scaled_code_matmul(
    x_codes_TI: torch.Tensor,
    x_scale_TG: torch.Tensor,
    w_codes_OI: torch.Tensor,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Forward of a ternary linear in one kernel: exact product of codes, scales in its epilogue (README eq. 1).

    int8 codes give the reference's bits on every device. e4m3 codes (INT4 or FP4 activations) have exact sums too, and
    may differ in the last bit of the output.
    Groups are added in order, each scaled by itself; ``run.deterministic`` layouts need a tree over groups
    instead: multiply them one by one with :func:`code_matmul`. On a GPU, groups whose size is no multiple of 16 are
    copied into padded storage first.

    Args:
        x_codes_TI: activation codes [T, I], int8 or e4m3.
        x_scale_TG: fp32 [T, G]; G equal blocks of the I inputs.
        w_codes_OI: ternary codes [O, I] of the same type.
        w_scale: fp32; for G = 1 one scale [1] or one per output [O], else one per group [G].
        out_dtype: of the result; e4m3 codes on a GPU give bf16 only.

    Returns:
        [T, O].

    Raises:
        TypeError: types of codes that differ or are neither int8 nor e4m3.
        ValueError: shapes that do not fit; scales that are not fp32; e4m3 codes with G > 1, or on a GPU with another
            ``out_dtype``.
    """
    check_codes(x_codes_TI, w_codes_OI)
    check_contracted(x_codes_TI, w_codes_OI)
    num_tokens, num_inputs = x_codes_TI.shape
    num_outputs, num_groups = len(w_codes_OI), _num_groups(x_scale_TG, num_tokens, num_inputs)
    fits = {1, num_outputs} if num_groups == 1 else {num_groups}
    if w_scale.dim() != 1 or len(w_scale) not in fits or w_scale.dtype != torch.float32:
        raise ValueError(
            f"w_scale must be fp32 with {sorted(fits)} values, got {w_scale.dtype} {list(w_scale.shape)} "
            f"for {num_groups} groups and {num_outputs} outputs"
        )
    if x_codes_TI.dtype == torch.float8_e4m3fn:
        if num_groups > 1 or (x_codes_TI.is_cuda and out_dtype != torch.bfloat16):
            raise ValueError(f"e4m3 codes need one group and bf16 output, got {num_groups} and {out_dtype}: use int8")
        if x_codes_TI.is_cuda:
            return float8_matmul(x_codes_TI, x_scale_TG, w_codes_OI, w_scale, fast_accum=False)
    w_scale_OG = (w_scale if num_groups > 1 else w_scale.unsqueeze(-1)).expand(num_outputs, num_groups)
    if not x_codes_TI.is_cuda:
        return scaled_code_matmul_reference(x_codes_TI, x_scale_TG, w_codes_OI, w_scale_OG, out_dtype)
    from bitmoe_kernels.ternary_gemm import triton_kernels

    y_TO = x_codes_TI.new_empty(num_tokens, num_outputs, dtype=out_dtype)
    x_codes_TI, w_codes_OI = (padded_groups(codes, num_groups) for codes in (x_codes_TI, w_codes_OI))
    group_size = x_codes_TI.shape[1] // num_groups
    triton_kernels.scaled_int8_matmul(x_codes_TI, x_scale_TG, w_codes_OI, w_scale_OG, group_size, y_TO)
    return y_TO


def padded_groups(codes_RI: torch.Tensor, num_groups: int) -> torch.Tensor:
    """``codes_RI`` with each group of columns padded with zeros to a multiple of 16, so that 16 bytes load at once."""
    group_size = codes_RI.shape[1] // num_groups
    if group_size % PADDING == 0:
        return rows_contiguous(codes_RI)
    return pad_last(codes_RI.unflatten(1, (num_groups, group_size)), padded_length(group_size)).flatten(1)


def _num_groups(x_scale_TG: torch.Tensor, num_tokens: int, num_inputs: int) -> int:
    if x_scale_TG.dtype != torch.float32 or x_scale_TG.dim() != 2 or len(x_scale_TG) != num_tokens:
        raise ValueError(
            f"x_scale must be fp32 [{num_tokens}, groups], got {x_scale_TG.dtype} {list(x_scale_TG.shape)}"
        )
    check_groups(x_scale_TG.shape[1], num_inputs, "inputs")
    return x_scale_TG.shape[1]


def check_codes(*codes: torch.Tensor) -> None:
    """Raise unless all are matrices of one type of codes."""
    if any(code.dtype not in CODE_DTYPES or code.dtype != codes[0].dtype for code in codes):
        raise TypeError(f"codes must all be int8 or all float8_e4m3fn, got {[code.dtype for code in codes]}")
    if any(code.dim() != 2 for code in codes):
        raise ValueError(f"codes must be matrices, got shapes {[list(code.shape) for code in codes]}")


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.no_grad()
def transpose_codes(codes_RC: torch.Tensor) -> torch.Tensor:
    """Transposed codes, which the 8-bit weight gradient multiplies: it needs the tokens contiguous.

    Args:
        codes_RC: int8 or e4m3 [R, C].

    Returns:
        [C, P] of the same type, P = R rounded up to 16, padded with zeros.

    Raises:
        TypeError: neither int8 nor e4m3.
        ValueError: not a matrix.
    """
    check_codes(codes_RC)
    if not codes_RC.is_cuda:
        return transpose_codes_reference(codes_RC)
    from bitmoe_kernels.ternary_gemm import triton_columns

    columns_CP = codes_RC.new_empty(codes_RC.shape[1], padded_length(len(codes_RC)))
    triton_columns.transpose_codes(codes_RC, columns_CP)
    return columns_CP
