"""8-bit backward of the ternary linears of routed experts: dY is rounded, codes of weights and activations stay exact.

``ternary_gemm.backward`` for rows sorted by expert: a scale never lies along a contracted dimension, and none belongs
to two experts. How many rows an expert has stays on the device; shapes have static bounds.
"""

from typing import NamedTuple

import torch

from bitmoe_kernels.grouped_ternary_gemm.float8_matmul import grouped_float8_matmul, grouped_float8_outer
from bitmoe_kernels.grouped_ternary_gemm.op import check_ends
from bitmoe_kernels.grouped_ternary_gemm.reference import (
    grouped_quantize_grad_reference,
    grouped_weight_grad_reference,
    padded_rows,
)
from bitmoe_kernels.ternary_gemm.backward import INT8_BLOCK_TOKENS
from bitmoe_kernels.ternary_gemm.op import CODE_DTYPES, rows_contiguous
from bitmoe_kernels.ternary_gemm.reference import LEVELS, MIN_ABSMAX, pad_last, padded_length
from bitmoe_kernels.validation import check_features, check_groups

# Shapes: R = rows sorted by expert, E = experts, I = inputs, O = outputs of the linear, G = groups of inputs,
#         P = padded_rows(R, E): room for every expert's rows from a multiple of 16 on, C = slots of column scales.


class GroupedQuantizedGrad(NamedTuple):
    """dY in the two forms its products need; ``x ~ codes * scale``. Rows past the last expert's are undefined."""

    rows_RO: torch.Tensor
    """e4m3 [R, O]: dY, times the weight scale per output where there is one."""
    row_scale_R1: torch.Tensor
    """fp32 [R, 1]."""
    columns_GOP: torch.Tensor
    """e4m3 or int8 [G, O, P]: dY times the token scale of each group of inputs, transposed; zeros after the rows of an
    expert, undefined after the last one's."""
    column_scale_GCO: torch.Tensor
    """fp32 [G, C, O], C = P // block_rows + E: the blocks of an expert whose padded rows begin at p follow one another
    from slot p // block_rows + expert on; slots between are undefined."""
    block_rows: int
    """Rows of one expert that share a column scale; more than P where all of them do (then C = E)."""
    padded_ends_E: torch.Tensor
    """int32 [E]: where each expert's padded rows end among P."""


@torch.no_grad()
def grouped_quantize_grad(
    dy_RO: torch.Tensor,
    x_scale_RG: torch.Tensor,
    w_scale_EO: torch.Tensor | None,
    ends_E: torch.Tensor,
    column_dtype: torch.dtype = torch.float8_e4m3fn,
) -> GroupedQuantizedGrad:
    """Round the gradient of the experts' outputs for both backward products (README eq. 3).

    Args:
        dy_RO: [R, O], bf16, fp16 or fp32.
        x_scale_RG: fp32 [R, G], the scales of the forward's rows.
        w_scale_EO: fp32 [E, O] where the weights have a scale per output row: folded into the rows. None where they
            have one scale per expert, or per expert and group of inputs: pass it to :func:`grouped_input_grad`.
        ends_E: int32 [E], where each expert's rows end.
        column_dtype: the type of the activations' transposed codes: e4m3 for INT4, int8 for INT8.

    Returns:
        The codes and scales. A row or column that holds NaN or Inf gets a NaN scale and codes 0.

    Raises:
        TypeError: ``dy_RO`` not floating point, an unknown ``column_dtype``, or ends that are not int32.
        ValueError: shapes that do not fit.
    """
    check_features(dy_RO, "dy")
    check_ends(ends_E)
    if column_dtype not in CODE_DTYPES:
        raise TypeError(f"column_dtype must be int8 or float8_e4m3fn, got {column_dtype}")
    if dy_RO.dim() != 2 or x_scale_RG.dim() != 2 or len(x_scale_RG) != len(dy_RO):
        raise ValueError(f"dy {list(dy_RO.shape)} and x_scale {list(x_scale_RG.shape)} must be [R, O] and [R, groups]")
    (num_rows, num_outputs), num_groups, num_experts = dy_RO.shape, x_scale_RG.shape[1], len(ends_E)
    if w_scale_EO is not None and w_scale_EO.shape != (num_experts, num_outputs):
        raise ValueError(f"w_scale has shape {list(w_scale_EO.shape)}: it must be [{num_experts}, {num_outputs}]")
    num_columns = padded_rows(num_rows, num_experts)
    block_rows = INT8_BLOCK_TOKENS if column_dtype == torch.int8 else num_columns + 1
    if not dy_RO.is_cuda:
        *codes, padded_ends_E = grouped_quantize_grad_reference(
            dy_RO, x_scale_RG, w_scale_EO, ends_E, column_dtype, block_rows
        )
        return GroupedQuantizedGrad(*codes, block_rows, padded_ends_E)
    from bitmoe_kernels.grouped_ternary_gemm import triton_codes

    num_slots = num_columns // block_rows + num_experts
    codes = (
        dy_RO.new_empty(num_rows, num_outputs, dtype=torch.float8_e4m3fn),
        dy_RO.new_empty(num_rows, 1, dtype=torch.float32),
        dy_RO.new_empty(num_groups, num_outputs, num_columns, dtype=column_dtype),
        dy_RO.new_empty(num_groups, num_slots, num_outputs, dtype=torch.float32),
    )
    tiles = triton_codes.grouped_quantize_grad(
        rows_contiguous(dy_RO),
        x_scale_RG,
        None if w_scale_EO is None else w_scale_EO.contiguous(),
        ends_E,
        block_rows,
        MIN_ABSMAX,
        (LEVELS[torch.float8_e4m3fn], LEVELS[column_dtype]),
        *codes,
    )
    return GroupedQuantizedGrad(*codes, block_rows, tiles.padded_ends_E)


@torch.no_grad()
def grouped_input_grad(
    grad: GroupedQuantizedGrad,
    w_codes_EIO: torch.Tensor,
    w_scale_EG: torch.Tensor | None,
    ends_E: torch.Tensor,
    *,
    fast_accum: bool = True,
) -> torch.Tensor:
    """Gradient of the experts' inputs: dX = dY @ W with each expert's exact ternary W (README eq. 4).

    Args:
        grad: from :func:`grouped_quantize_grad`.
        w_codes_EIO: transposed weight codes, e4m3 [E, I, O rounded up to 16], from :func:`batched_k_major_codes`.
        w_scale_EG: fp32, one scale [E, 1] or one per group of inputs [E, G]; None where ``grad`` holds it already.
        ends_E: int32 [E], as in ``grad``.
        fast_accum: keep sums in the tensor cores, as in ``ternary_gemm.backward``.

    Returns:
        bf16 [R, I]; rows past the last expert's are undefined.

    Raises:
        TypeError: weight codes that are not e4m3, or ends that are not int32.
        ValueError: shapes that do not fit.
    """
    check_ends(ends_E)
    if w_codes_EIO.dtype != torch.float8_e4m3fn:
        raise TypeError(f"w_codes must be float8_e4m3fn, got {w_codes_EIO.dtype}")
    num_experts, num_outputs = len(ends_E), padded_length(grad.rows_RO.shape[1])
    if w_codes_EIO.dim() != 3 or (len(w_codes_EIO), w_codes_EIO.shape[2]) != (num_experts, num_outputs):
        raise ValueError(f"w_codes of shape {list(w_codes_EIO.shape)} must be [{num_experts}, I, {num_outputs}]")
    num_inputs = w_codes_EIO.shape[1]
    w_scale_EG = grad.row_scale_R1.new_ones(1, 1).expand(num_experts, 1) if w_scale_EG is None else w_scale_EG
    if w_scale_EG.dim() != 2 or len(w_scale_EG) != num_experts:
        raise ValueError(f"w_scale of shape {list(w_scale_EG.shape)} must be [{num_experts}, groups]")
    check_groups(w_scale_EG.shape[1], num_inputs, "inputs")
    w_scale_EI = w_scale_EG.unsqueeze(2).expand(-1, -1, num_inputs // w_scale_EG.shape[1]).flatten(1)
    rows_RO = grad.rows_RO
    if rows_RO.shape[1] < num_outputs:
        rows_RO = pad_last(rows_RO, num_outputs)
    return grouped_float8_matmul(
        rows_RO, grad.row_scale_R1, w_codes_EIO.contiguous(), w_scale_EI, ends_E, fast_accum=fast_accum
    )


@torch.no_grad()
def grouped_weight_grad(
    grad: GroupedQuantizedGrad, x_codes_IP: torch.Tensor, *, fast_accum: bool = True
) -> torch.Tensor:
    """Gradient of the experts' weights: dW = dY^T @ X with exact activation codes (README eq. 5).

    Args:
        grad: from :func:`grouped_quantize_grad`, with columns of the type of ``x_codes_IP``.
        x_codes_IP: transposed activation codes, e4m3 or int8 [I, P], from :func:`grouped_k_major_codes`.
        fast_accum: as in :func:`grouped_input_grad`; int8 sums are exact always.

    Returns:
        bf16 [E, O, I], zeros for experts without rows.

    Raises:
        TypeError: codes of different types.
        ValueError: shapes that do not fit.
    """
    num_groups, num_outputs, num_columns = grad.columns_GOP.shape
    if x_codes_IP.dtype != grad.columns_GOP.dtype:
        raise TypeError(f"codes must be of one type, got {grad.columns_GOP.dtype} and {x_codes_IP.dtype}")
    if x_codes_IP.dim() != 2 or x_codes_IP.shape[1] != num_columns:
        raise ValueError(f"x_codes of shape {list(x_codes_IP.shape)} must be [I, {num_columns}]")
    num_inputs = len(x_codes_IP)
    check_groups(num_groups, num_inputs, "inputs")
    operands = (
        grad.columns_GOP,
        grad.column_scale_GCO,
        x_codes_IP.contiguous(),
        grad.padded_ends_E,
        grad.block_rows,
    )
    if x_codes_IP.dtype == torch.float8_e4m3fn:
        return grouped_float8_outer(*operands, fast_accum=fast_accum)
    if not x_codes_IP.is_cuda:
        return grouped_weight_grad_reference(*operands)
    from bitmoe_kernels.grouped_ternary_gemm import triton_kernels

    dw_EOI = x_codes_IP.new_empty(len(grad.padded_ends_E), num_outputs, num_inputs, dtype=torch.bfloat16)
    triton_kernels.grouped_outer(*operands, dw_EOI)
    return dw_EOI
