"""8-bit backward of the ternary linears of routed experts: dY is rounded once, all other codes stay exact.

``ternary_gemm.backward`` for rows sorted by expert: a scale never lies along a contracted dimension, and none belongs
to two experts. How many rows an expert has stays on the device; shapes have static bounds.
"""

from typing import NamedTuple

import torch

from bitmoe_kernels.dispatch import runs_triton, runs_triton_by_row
from bitmoe_kernels.grouped_ternary_gemm.float8_matmul import grouped_float8_matmul, grouped_float8_outer
from bitmoe_kernels.grouped_ternary_gemm.op import check_ends
from bitmoe_kernels.grouped_ternary_gemm.reference import (
    PADDING,
    grouped_int8_outer_reference,
    grouped_quantize_columns_reference,
    grouped_quantize_grad_reference,
    grouped_shifted_columns_reference,
    grouped_transpose_codes_reference,
    padded_ends_reference,
    padded_rows,
    rows_of_tokens,
)
from bitmoe_kernels.ternary_gemm.backward import FLOAT8, check_int8_codes
from bitmoe_kernels.ternary_gemm.op import rows_contiguous
from bitmoe_kernels.ternary_gemm.reference import (
    CHUNK,
    LARGEST_SHIFT,
    pad_last,
    padded_length,
    quantize_grad_reference,
)
from bitmoe_kernels.validation import check_features, check_groups

# Shapes: R = rows sorted by expert, E = experts, I = inputs, O = outputs of the linear, G = groups of inputs,
#         P = padded_rows(R, E): room for every expert's rows from a multiple of 128 on.


class GroupedQuantizedGrad(NamedTuple):
    """dY as its products take it; ``x ~ codes * scale``. Rows past the last expert's are undefined."""

    codes_RO: torch.Tensor
    """e4m3 [R, O]: dY, times the weight scale per output where there is one."""
    scale_R1: torch.Tensor
    """fp32 [R, 1]."""
    power_R1: torch.Tensor | None = None
    """fp32 [R, 1]: the scale times that of the row's activations, a power of 2, where that was passed."""
    largest_E: torch.Tensor | None = None
    """fp32 [E]: the largest of each expert's powers; Inf where a row is not finite, 0 without rows."""


@torch.no_grad()
def grouped_quantize_grad(
    dy_RO: torch.Tensor,
    ends_E: torch.Tensor,
    w_scale_EO: torch.Tensor | None = None,
    x_scale_R1: torch.Tensor | None = None,
) -> GroupedQuantizedGrad:
    """Round the gradient of the experts' outputs (README eq. 3).

    Args:
        dy_RO: [R, O], bf16, fp16 or fp32.
        ends_E: int32 [E], where each expert's rows end.
        w_scale_EO: fp32 [E, O] where the weights have a scale per output row: folded into the codes. None where they
            have one scale per expert, or per expert and group of inputs: pass it to :func:`grouped_input_grad`.
        x_scale_R1: fp32 [R, 1], the token scales of e4m3 activations: prepare for :func:`grouped_weight_grad`, too.

    Returns:
        The codes and scales. A row that holds NaN or Inf gets a NaN scale and codes 0.

    Raises:
        TypeError: ``dy_RO`` not floating point, or ends that are not int32.
        ValueError: shapes that do not fit.
    """
    _check_grad(dy_RO, ends_E, w_scale_EO, x_scale_R1)
    if not runs_triton_by_row(dy_RO):
        return GroupedQuantizedGrad(*grouped_quantize_grad_reference(dy_RO, w_scale_EO, x_scale_R1, ends_E))
    from bitmoe_kernels.ternary_gemm import triton_grad

    return GroupedQuantizedGrad(*triton_grad.quantize_grad(dy_RO, w_scale_EO, x_scale_R1, ends_E))


@torch.no_grad()
def grouped_quantize_token_grad(dy_TO: torch.Tensor, row_TK: torch.Tensor) -> GroupedQuantizedGrad:
    """Round the gradient that all rows of a token share, once a token, for :func:`grouped_input_grad`.

    Args:
        dy_TO: [T, O], bf16, fp16 or fp32.
        row_TK: int32 [T, K], the rows that are copies of each token; each of 0 to T * K - 1 once. Not checked: looking
            would make a GPU wait.

    Returns:
        What :func:`grouped_quantize_grad` gives for the rows: codes [R, O] and scale [R, 1].

    Raises:
        TypeError: ``dy_TO`` not floating point, or rows that are not int32.
        ValueError: shapes that do not fit.
    """
    check_features(dy_TO, "dy")
    if row_TK.dtype != torch.int32:
        raise TypeError(f"rows must be int32, got {row_TK.dtype}")
    if dy_TO.dim() != 2 or row_TK.dim() != 2 or len(row_TK) != len(dy_TO):
        raise ValueError(f"dy {list(dy_TO.shape)} and rows {list(row_TK.shape)} must be [T, O] and [T, K]")
    if runs_triton_by_row(dy_TO):
        from bitmoe_kernels.ternary_gemm import triton_grad

        return GroupedQuantizedGrad(*triton_grad.quantize_grad(dy_TO, None, None, None, row_TK))
    source_R = row_TK.flatten().argsort() // row_TK.shape[1]
    return GroupedQuantizedGrad(*(rows_of_tokens(x, source_R) for x in quantize_grad_reference(dy_TO, None, None)))


def _check_grad(dy_RO: torch.Tensor, ends_E: torch.Tensor, w_scale_EO, x_scale_R1) -> None:
    check_features(dy_RO, "dy")
    check_ends(ends_E)
    if dy_RO.dim() != 2:
        raise ValueError(f"dy of shape {list(dy_RO.shape)} must be [R, O]")
    (num_rows, num_outputs), num_experts = dy_RO.shape, len(ends_E)
    if w_scale_EO is not None and w_scale_EO.shape != (num_experts, num_outputs):
        raise ValueError(f"w_scale has shape {list(w_scale_EO.shape)}: it must be [{num_experts}, {num_outputs}]")
    if x_scale_R1 is not None and x_scale_R1.shape != (num_rows, 1):
        raise ValueError(f"x_scale of shape {list(x_scale_R1.shape)} must be [{num_rows}, 1]: it needs one group")


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
    num_experts, num_outputs = len(ends_E), padded_length(grad.codes_RO.shape[1])
    if w_codes_EIO.dim() != 3 or (len(w_codes_EIO), w_codes_EIO.shape[2]) != (num_experts, num_outputs):
        raise ValueError(f"w_codes of shape {list(w_codes_EIO.shape)} must be [{num_experts}, I, {num_outputs}]")
    num_inputs = w_codes_EIO.shape[1]
    w_scale_EG = grad.scale_R1.new_ones(1, 1).expand(num_experts, 1) if w_scale_EG is None else w_scale_EG
    if w_scale_EG.dim() != 2 or len(w_scale_EG) != num_experts:
        raise ValueError(f"w_scale of shape {list(w_scale_EG.shape)} must be [{num_experts}, groups]")
    check_groups(w_scale_EG.shape[1], num_inputs, "inputs")
    w_scale_EI = w_scale_EG.unsqueeze(2).expand(-1, -1, num_inputs // w_scale_EG.shape[1]).flatten(1)
    codes_RO = grad.codes_RO
    if codes_RO.shape[1] < num_outputs:
        codes_RO = pad_last(codes_RO, num_outputs)
    return grouped_float8_matmul(
        codes_RO, grad.scale_R1, w_codes_EIO.contiguous(), w_scale_EI, ends_E, fast_accum=fast_accum
    )


@torch.no_grad()
def grouped_weight_grad(
    grad: GroupedQuantizedGrad,
    x_codes_RI: torch.Tensor,
    w_scale_EO: torch.Tensor | None,
    ends_E: torch.Tensor,
    *,
    source_R: torch.Tensor | None = None,
    fast_accum: bool = True,
) -> torch.Tensor:
    """Gradient of the experts' weights: dW = dY^T @ X with exact activation codes (README eq. 5 and 6).

    Args:
        grad: from :func:`grouped_quantize_grad`, with the token scales of the activations.
        x_codes_RI: activation codes, e4m3 [R, I], or with ``source_R`` those of tokens [T, I].
        w_scale_EO: fp32 [E, O], as given to :func:`grouped_quantize_grad`; None where none was.
        ends_E: int32 [E], as in ``grad``.
        source_R: int32 [R], whose codes each row has: rows need not be copies of tokens.
        fast_accum: as in :func:`grouped_input_grad`.

    Returns:
        bf16 [E, O, I], zeros for experts without rows; NaN for an expert with a row of dY that was not finite.

    Raises:
        TypeError: activation codes that are not e4m3.
        ValueError: a gradient rounded without the activations' scales, or shapes that do not fit.
    """
    if grad.power_R1 is None:
        raise ValueError("the gradient was rounded for the input gradient alone: pass x_scale to grouped_quantize_grad")
    if x_codes_RI.dtype != FLOAT8:
        raise TypeError(f"x_codes must be float8_e4m3fn, got {x_codes_RI.dtype}")
    num_rows, num_outputs = grad.codes_RO.shape
    num_sources = len(x_codes_RI if source_R is None else source_R)
    if x_codes_RI.dim() != 2 or num_sources != num_rows:
        raise ValueError(
            f"x_codes of shape {list(x_codes_RI.shape)} must be [{num_rows}, I], or [T, I] with a source for each row"
        )
    scale_E1 = grad.largest_E.unsqueeze(1) / LARGEST_SHIFT
    scale_EO = scale_E1.expand(-1, num_outputs) if w_scale_EO is None else scale_E1 / w_scale_EO
    dy_columns_OP, x_columns_IP, padded_ends_E = _columns(grad, x_codes_RI, ends_E, source_R)
    return grouped_float8_outer(
        dy_columns_OP, scale_EO.contiguous(), x_columns_IP, padded_ends_E, fast_accum=fast_accum
    )


def _columns(
    grad: GroupedQuantizedGrad, x_codes_RI: torch.Tensor, ends_E: torch.Tensor, source_R: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Transposed codes of dY [O, P] and, shifted, of activations [I, P]; where each expert's padded rows end [E]."""
    powers = grad.power_R1, grad.largest_E
    if not x_codes_RI.is_cuda:
        x_codes_RI = x_codes_RI if source_R is None else rows_of_tokens(x_codes_RI, source_R)
        columns = grouped_transpose_codes_reference(grad.codes_RO, ends_E)
        return columns, grouped_shifted_columns_reference(x_codes_RI, *powers, ends_E), padded_ends_reference(ends_E)
    from bitmoe_kernels.grouped_ternary_gemm.triton_codes import grouped_transpose_codes
    from bitmoe_kernels.grouped_ternary_gemm.triton_row_tiles import row_tiles
    from bitmoe_kernels.ternary_gemm.triton_columns import COLUMN_TILE

    num_columns = padded_rows(len(grad.codes_RO), len(ends_E))
    tiles = row_tiles(ends_E, num_columns, COLUMN_TILE["BLOCK_ROWS"], padding=PADDING)
    dy_columns_OP, x_columns_IP = (x_codes_RI.new_empty(x.shape[1], num_columns) for x in (grad.codes_RO, x_codes_RI))
    grouped_transpose_codes(grad.codes_RO, tiles, dy_columns_OP)
    grouped_transpose_codes(x_codes_RI, tiles, x_columns_IP, *powers, source_R)
    return dy_columns_OP, x_columns_IP, tiles.padded_ends_E


@torch.no_grad()
def grouped_int8_weight_grad(
    dy_RO: torch.Tensor,
    x_codes_RI: torch.Tensor,
    x_scale_R1: torch.Tensor,
    ends_E: torch.Tensor,
    *,
    source_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of the experts' weights: dW = dY^T @ X with exact INT8 activation codes (README eq. 7 and 8).

    Args:
        dy_RO: [R, O], bf16, fp16, fp32 or fp64, not rounded yet; with ``source_R`` those of tokens [T, O].
        x_codes_RI: activation codes, int8 [R, I].
        x_scale_R1: their scales [R, 1].
        ends_E: int32 [E], where each expert's rows end.
        source_R: int32 [R], whose gradient each row has: rows need not be copies of tokens.

    Returns:
        [E, O, I] in the dtype of ``dy_RO``, zeros for experts without rows; NaN for an expert's output whose gradient
        is not finite somewhere.

    Raises:
        TypeError: ``dy_RO`` not floating point, codes that are not int8, or ends that are not int32.
        ValueError: shapes that do not fit.
    """
    check_features(dy_RO, "dy")
    check_ends(ends_E)
    num_rows, num_experts = len(dy_RO if source_R is None else source_R), len(ends_E)
    check_int8_codes(x_codes_RI, num_rows)
    if dy_RO.dim() != 2 or x_scale_R1.shape != (num_rows, 1):
        raise ValueError(
            f"dy and x_scale of shapes {list(dy_RO.shape)} and {list(x_scale_R1.shape)} must be [R, O] and [R, 1]"
        )
    if not runs_triton(dy_RO):
        dy_RO = dy_RO if source_R is None else dy_RO.index_select(0, source_R)
        columns = grouped_quantize_columns_reference(dy_RO, x_scale_R1, ends_E)
        x_columns_IP = grouped_transpose_codes_reference(x_codes_RI, ends_E, CHUNK)
        padded_ends_E = padded_ends_reference(ends_E, CHUNK)
        return grouped_int8_outer_reference(*columns, x_columns_IP, padded_ends_E).to(dy_RO.dtype)
    from bitmoe_kernels.grouped_ternary_gemm.triton_codes import CHUNK_TILE, grouped_transpose_codes
    from bitmoe_kernels.grouped_ternary_gemm.triton_row_tiles import row_tiles
    from bitmoe_kernels.ternary_gemm.triton_grad_columns import quantize_columns
    from bitmoe_kernels.ternary_gemm.triton_outer import outer

    num_columns = padded_rows(num_rows, num_experts, CHUNK)
    tiles = row_tiles(ends_E, num_columns, CHUNK, padding=CHUNK)
    dy_columns_OP, x_columns_IP = (x_codes_RI.new_empty(x.shape[1], num_columns) for x in (dy_RO, x_codes_RI))
    scale_CO = x_scale_R1.new_empty(num_columns // CHUNK, dy_RO.shape[1])
    quantize_columns(rows_contiguous(dy_RO), x_scale_R1, dy_columns_OP, scale_CO, tiles, source_R)
    grouped_transpose_codes(x_codes_RI, tiles, x_columns_IP, tile=CHUNK_TILE)
    dw_EOI = dy_RO.new_empty(num_experts, dy_RO.shape[1], x_codes_RI.shape[1])
    outer(dy_columns_OP, scale_CO, x_columns_IP, tiles.padded_ends_E, dw_EOI)
    return dw_EOI
