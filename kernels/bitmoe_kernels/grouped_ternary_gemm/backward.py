"""8-bit backward of the ternary linears of routed experts: dY is rounded, codes of weights and activations stay exact.

``ternary_gemm.backward`` for rows sorted by expert: a scale never lies along a contracted dimension, and none belongs
to two experts. How many rows an expert has stays on the device; shapes have static bounds.
"""

from typing import NamedTuple

import torch

from bitmoe_kernels.dispatch import runs_triton, runs_triton_by_row
from bitmoe_kernels.grouped_ternary_gemm.float8_matmul import grouped_float8_matmul, grouped_float8_outer
from bitmoe_kernels.grouped_ternary_gemm.op import check_ends
from bitmoe_kernels.grouped_ternary_gemm.reference import (
    grouped_quantize_columns_reference,
    grouped_quantize_rows_reference,
    padded_rows,
)
from bitmoe_kernels.ternary_gemm.backward import FLOAT8
from bitmoe_kernels.ternary_gemm.reference import pad_last, padded_length
from bitmoe_kernels.validation import check_features, check_groups

# Shapes: R = rows sorted by expert, E = experts, I = inputs, O = outputs of the linear, G = groups of inputs,
#         P = padded_rows(R, E): room for every expert's rows from a multiple of 16 on.


class GroupedQuantizedGrad(NamedTuple):
    """dY in the forms its products need; ``x ~ codes * scale``. Rows past the last expert's are undefined."""

    rows_RO: torch.Tensor
    """e4m3 [R, O]: dY, times the weight scale per output where there is one."""
    row_scale_R1: torch.Tensor
    """fp32 [R, 1]."""
    columns_OP: torch.Tensor | None = None
    """e4m3 [O, P]: dY times the token scale of the activations, transposed, where asked for; zeros after the rows of an
    expert, undefined after the last one's."""
    column_scale_EO: torch.Tensor | None = None
    """fp32 [E, O]."""
    padded_ends_E: torch.Tensor | None = None
    """int32 [E]: where each expert's padded rows end among P."""


@torch.no_grad()
def grouped_quantize_grad(
    dy_RO: torch.Tensor,
    ends_E: torch.Tensor,
    w_scale_EO: torch.Tensor | None = None,
    x_scale_R1: torch.Tensor | None = None,
) -> GroupedQuantizedGrad:
    """Round the gradient of the experts' outputs for one backward product or both (README eq. 3).

    Args:
        dy_RO: [R, O], bf16, fp16 or fp32.
        ends_E: int32 [E], where each expert's rows end.
        w_scale_EO: fp32 [E, O] where the weights have a scale per output row: folded into the rows. None where they
            have one scale per expert, or per expert and group of inputs: pass it to :func:`grouped_input_grad`.
        x_scale_R1: fp32 [R, 1], the token scales of e4m3 activations: write the columns, too, for
            :func:`grouped_weight_grad`.

    Returns:
        The codes and scales. A row or column that holds NaN or Inf gets a NaN scale and codes 0.

    Raises:
        TypeError: ``dy_RO`` not floating point, or ends that are not int32.
        ValueError: shapes that do not fit.
    """
    _check_grad(dy_RO, ends_E, w_scale_EO, x_scale_R1)
    dy_RO = dy_RO.contiguous()
    runs = runs_triton_by_row(dy_RO) if x_scale_R1 is None else runs_triton(dy_RO)
    if not runs:
        rows = grouped_quantize_rows_reference(dy_RO, w_scale_EO, ends_E)
        columns = () if x_scale_R1 is None else grouped_quantize_columns_reference(dy_RO, x_scale_R1, ends_E)
        return GroupedQuantizedGrad(*rows, *columns)
    from bitmoe_kernels.grouped_ternary_gemm import triton_codes
    from bitmoe_kernels.ternary_gemm import triton_grad

    (num_rows, num_outputs), num_experts = dy_RO.shape, len(ends_E)
    rows = dy_RO.new_empty(num_rows, num_outputs, dtype=FLOAT8), dy_RO.new_empty(num_rows, 1, dtype=torch.float32)
    w_scale_EO = None if w_scale_EO is None else w_scale_EO.contiguous()
    if x_scale_R1 is None:
        triton_grad.quantize_rows(dy_RO, w_scale_EO, ends_E, *rows)
        return GroupedQuantizedGrad(*rows)
    columns = (
        dy_RO.new_empty(num_outputs, padded_rows(num_rows, num_experts), dtype=FLOAT8),
        dy_RO.new_empty(num_experts, num_outputs, dtype=torch.float32),
    )
    inputs = (dy_RO, w_scale_EO, x_scale_R1.contiguous(), ends_E)
    tiles = triton_codes.grouped_quantize_rows_and_columns(*inputs, *rows, *columns)
    return GroupedQuantizedGrad(*rows, *columns, tiles.padded_ends_E)


def _check_grad(dy_RO: torch.Tensor, ends_E: torch.Tensor, w_scale_EO, x_scale_R1) -> None:
    check_features(dy_RO, "dy")
    check_ends(ends_E)
    if dy_RO.dim() != 2:
        raise ValueError(f"dy of shape {list(dy_RO.shape)} must be [R, O]")
    (num_rows, num_outputs), num_experts = dy_RO.shape, len(ends_E)
    if w_scale_EO is not None and w_scale_EO.shape != (num_experts, num_outputs):
        raise ValueError(f"w_scale has shape {list(w_scale_EO.shape)}: it must be [{num_experts}, {num_outputs}]")
    if x_scale_R1 is not None and x_scale_R1.shape != (num_rows, 1):
        raise ValueError(f"x_scale of shape {list(x_scale_R1.shape)} must be [{num_rows}, 1]: columns need one group")


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
        w_codes_EIO: transposed weight codes, e4m3 [E, I, O rounded up to 16], from
            ``weight_quant.ternary_operands``.
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
        grad: from :func:`grouped_quantize_grad`, with columns.
        x_codes_IP: transposed activation codes, e4m3 [I, P], from ``grouped_transpose_codes``.
        fast_accum: as in :func:`grouped_input_grad`.

    Returns:
        bf16 [E, O, I], zeros for experts without rows.

    Raises:
        TypeError: activation codes that are not e4m3.
        ValueError: a gradient without columns, or shapes that do not fit.
    """
    if grad.columns_OP is None:
        raise ValueError("the gradient was rounded by row only: pass x_scale to grouped_quantize_grad")
    if x_codes_IP.dtype != FLOAT8:
        raise TypeError(f"x_codes must be float8_e4m3fn, got {x_codes_IP.dtype}")
    num_columns = grad.columns_OP.shape[1]
    if x_codes_IP.dim() != 2 or x_codes_IP.shape[1] != num_columns:
        raise ValueError(f"x_codes of shape {list(x_codes_IP.shape)} must be [I, {num_columns}]")
    columns = (grad.columns_OP, grad.column_scale_EO)
    return grouped_float8_outer(*columns, x_codes_IP.contiguous(), grad.padded_ends_E, fast_accum=fast_accum)
