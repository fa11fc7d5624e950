"""8-bit backward of a ternary linear: dY is rounded to e4m3, the codes of weights and activations stay exact.

``quantize_grad`` rounds dY per token for the input gradient and, where asked, per output channel with the token scales
of the activations folded in, for the weight gradient. Scales then never lie along the contracted dimension. The
weight gradient is for e4m3 codes (INT4, FP4). For INT8 codes it multiplies in bf16 without rounding: rounding dY to
int8, too, needs a scale for each block of tokens, and rescaling between blocks costs what the tensor cores gain.
Its users are plain functions; the autograd function belongs to the layer that owns the linear.

FP8 sums are kept in the tensor cores (``fast_accum``), where they have about 14 significant bits. Simulated over 8192
tokens, that lets the error grow from 2.65 % of the norm (rounding of dY alone) to 2.70 %.
"""

from typing import NamedTuple

import torch

from bitmoe_kernels.dispatch import runs_triton, runs_triton_by_row
from bitmoe_kernels.ternary_gemm.float8_matmul import float8_matmul
from bitmoe_kernels.ternary_gemm.op import check_codes
from bitmoe_kernels.ternary_gemm.reference import padded_length, quantize_columns_reference, quantize_rows_reference
from bitmoe_kernels.validation import check_features, check_groups

# Shapes: T = tokens, P = T rounded up to 16, I = inputs, O = outputs of the linear, G = groups of inputs.

FLOAT8 = torch.float8_e4m3fn


class QuantizedGrad(NamedTuple):
    """dY in the forms its products need; ``x ~ codes * scale``."""

    rows_TO: torch.Tensor
    """e4m3 [T, O]: dY, times the weight scale per output where there is one."""
    row_scale_T1: torch.Tensor
    """fp32 [T, 1]."""
    columns_OP: torch.Tensor | None = None
    """e4m3 [O, P]: dY times the token scale of the activations, transposed, where asked for."""
    column_scale_O1: torch.Tensor | None = None
    """fp32 [O, 1]."""


@torch.no_grad()
def quantize_grad(
    dy_TO: torch.Tensor, w_scale_O: torch.Tensor | None = None, x_scale_T1: torch.Tensor | None = None
) -> QuantizedGrad:
    """Round the gradient of a linear's output for one backward product or both (README eq. 2 and 3).

    Args:
        dy_TO: [T, O], bf16, fp16 or fp32.
        w_scale_O: fp32 [O] where the weights have a scale per output row: folded into the rows. None where
            they have one scale, or one per group of inputs: pass it to :func:`input_grad`.
        x_scale_T1: fp32 [T, 1], the token scales of e4m3 activations: write the columns, too, for :func:`weight_grad`.

    Returns:
        The codes and scales. A row or column that holds NaN or Inf gets a NaN scale and codes 0.

    Raises:
        TypeError: ``dy_TO`` not floating point.
        ValueError: shapes that do not fit.
    """
    _check_grad(dy_TO, w_scale_O, x_scale_T1)
    dy_TO = dy_TO.contiguous()
    runs = runs_triton_by_row(dy_TO) if x_scale_T1 is None else runs_triton(dy_TO)
    if not runs:
        rows = quantize_rows_reference(dy_TO, w_scale_O)
        return QuantizedGrad(*rows, *(() if x_scale_T1 is None else quantize_columns_reference(dy_TO, x_scale_T1)))
    from bitmoe_kernels.ternary_gemm import triton_grad

    num_tokens, num_outputs = dy_TO.shape
    rows = dy_TO.new_empty(num_tokens, num_outputs, dtype=FLOAT8), dy_TO.new_empty(num_tokens, 1, dtype=torch.float32)
    w_scale_O = None if w_scale_O is None else w_scale_O.contiguous()
    if x_scale_T1 is None:
        triton_grad.quantize_rows(dy_TO, w_scale_O, None, *rows)
        return QuantizedGrad(*rows)
    columns_OP = dy_TO.new_empty(num_outputs, padded_length(num_tokens), dtype=FLOAT8)
    column_scale_O1 = dy_TO.new_empty(num_outputs, 1, dtype=torch.float32)
    grad = QuantizedGrad(*rows, columns_OP, column_scale_O1)
    triton_grad.quantize_rows_and_columns(dy_TO, w_scale_O, x_scale_T1.contiguous(), *grad)
    return grad


def _check_grad(dy_TO: torch.Tensor, w_scale_O: torch.Tensor | None, x_scale_T1: torch.Tensor | None) -> None:
    check_features(dy_TO, "dy")
    if dy_TO.dim() != 2:
        raise ValueError(f"dy of shape {list(dy_TO.shape)} must be [T, O]")
    num_tokens, num_outputs = dy_TO.shape
    if w_scale_O is not None and w_scale_O.shape != (num_outputs,):
        raise ValueError(f"w_scale has shape {list(w_scale_O.shape)}: it must have one value for each of {num_outputs}")
    if x_scale_T1 is not None and x_scale_T1.shape != (num_tokens, 1):
        raise ValueError(f"x_scale of shape {list(x_scale_T1.shape)} must be [{num_tokens}, 1]: columns need one group")


@torch.no_grad()
def input_grad(
    grad: QuantizedGrad, w_codes_IO: torch.Tensor, w_scale: torch.Tensor | None = None, *, fast_accum: bool = True
) -> torch.Tensor:
    """Gradient of a linear's input: dX = dY @ W with exact ternary W (README eq. 4).

    Args:
        grad: from :func:`quantize_grad`.
        w_codes_IO: transposed weight codes, e4m3 [I, O], from ``weight_quant.ternary_operands`` (padding of O is
            dropped).
        w_scale: fp32, one scale [1] or one per group of inputs [G]; None where ``grad`` holds it already.
        fast_accum: see the module.

    Returns:
        bf16 [T, I].

    Raises:
        TypeError: weight codes that are not e4m3.
        ValueError: shapes that do not fit.
    """
    check_codes(grad.rows_TO, w_codes_IO)
    num_inputs, num_outputs = len(w_codes_IO), grad.rows_TO.shape[1]
    if w_codes_IO.shape[1] not in {num_outputs, padded_length(num_outputs)}:
        raise ValueError(f"w_codes of shape {list(w_codes_IO.shape)} must be [I, O] with O = {num_outputs}")
    w_scale = grad.row_scale_T1.new_ones(1) if w_scale is None else w_scale
    check_groups(len(w_scale), num_inputs, "inputs")
    w_scale_I = w_scale.unsqueeze(1).expand(-1, num_inputs // len(w_scale)).flatten()
    return float8_matmul(grad.rows_TO, grad.row_scale_T1, w_codes_IO[:, :num_outputs], w_scale_I, fast_accum=fast_accum)


@torch.no_grad()
def weight_grad(grad: QuantizedGrad, x_codes_IP: torch.Tensor, *, fast_accum: bool = True) -> torch.Tensor:
    """Gradient of a linear's weight: dW = dY^T @ X with exact activation codes (README eq. 5).

    Args:
        grad: from :func:`quantize_grad`, with columns.
        x_codes_IP: transposed activation codes, e4m3 [I, P], from ``transpose_codes``.
        fast_accum: see the module.

    Returns:
        bf16 [O, I].

    Raises:
        TypeError: activation codes that are not e4m3.
        ValueError: a gradient without columns, or shapes that do not fit.
    """
    if grad.columns_OP is None:
        raise ValueError("the gradient was rounded by row only: pass x_scale to quantize_grad")
    check_codes(grad.columns_OP, x_codes_IP)
    if x_codes_IP.shape[1] != grad.columns_OP.shape[1]:
        raise ValueError(f"x_codes of shape {list(x_codes_IP.shape)} must be [I, {grad.columns_OP.shape[1]}]")
    one = grad.row_scale_T1.new_ones(1)
    return float8_matmul(grad.columns_OP, grad.column_scale_O1, x_codes_IP, one, fast_accum=fast_accum)
