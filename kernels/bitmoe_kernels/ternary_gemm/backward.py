"""8-bit backward of a ternary linear: dY is rounded to e4m3 once, the codes of weights and activations stay exact.

Each token of dY has a scale. The input gradient contracts outputs and takes it as it is. The weight gradient contracts
tokens, where no scale may stand between: the token's scale times that of its activations is made a power of 2, which
the e4m3 codes of the activations (INT4, FP4) take up without rounding. So one rounding serves both products, and what
the second one needs by column is a transposed copy of bytes.

INT8 codes fill their 8 bits. For their weight gradient dY, times the token scales, is rounded once more, to INT8 with a
scale for each output and CHUNK tokens: :func:`int8_weight_grad`.
The users are plain functions; the autograd function belongs to the layer that owns the linear.

FP8 sums are kept in the tensor cores (``fast_accum``), where they have about 14 significant bits. Simulated over 8192
tokens, that lets the error grow from 2.65 % of the norm (rounding of dY alone) to 2.70 %.
"""

from typing import NamedTuple

import torch

from bitmoe_kernels.dispatch import runs_triton, runs_triton_by_row
from bitmoe_kernels.ternary_gemm.float8_matmul import float8_matmul
from bitmoe_kernels.ternary_gemm.op import check_codes, rows_contiguous, transpose_codes
from bitmoe_kernels.ternary_gemm.reference import (
    CHUNK,
    LARGEST_SHIFT,
    int8_outer_reference,
    padded_length,
    quantize_columns_reference,
    quantize_grad_reference,
    shifted_columns_reference,
)
from bitmoe_kernels.validation import check_features, check_groups

# Shapes: T = tokens, P = T rounded up to 16, I = inputs, O = outputs of the linear, G = groups of inputs.

FLOAT8 = torch.float8_e4m3fn


class QuantizedGrad(NamedTuple):
    """dY as its products take it; ``x ~ codes * scale``."""

    codes_TO: torch.Tensor
    """e4m3 [T, O]: dY, times the weight scale per output where there is one."""
    scale_T1: torch.Tensor
    """fp32 [T, 1]."""
    power_T1: torch.Tensor | None = None
    """fp32 [T, 1]: the scale times that of the token's activations, a power of 2, where that was passed."""
    largest_1: torch.Tensor | None = None
    """fp32 [1]: the largest of the powers; Inf where a token is not finite."""


@torch.no_grad()
def quantize_grad(
    dy_TO: torch.Tensor, w_scale_O: torch.Tensor | None = None, x_scale_T1: torch.Tensor | None = None
) -> QuantizedGrad:
    """Round the gradient of a linear's output (README eq. 2 and 3).

    Args:
        dy_TO: [T, O], bf16, fp16 or fp32.
        w_scale_O: fp32 [O] where the weights have a scale per output row: folded into the codes. None where
            they have one scale, or one per group of inputs: pass it to :func:`input_grad`.
        x_scale_T1: fp32 [T, 1], the token scales of e4m3 activations: prepare for :func:`weight_grad`, too.

    Returns:
        The codes and scales. A token that holds NaN or Inf gets a NaN scale and codes 0.

    Raises:
        TypeError: ``dy_TO`` not floating point.
        ValueError: shapes that do not fit.
    """
    _check_grad(dy_TO, w_scale_O, x_scale_T1)
    if not runs_triton_by_row(dy_TO):
        return QuantizedGrad(*quantize_grad_reference(dy_TO, w_scale_O, x_scale_T1))
    from bitmoe_kernels.ternary_gemm import triton_grad

    return QuantizedGrad(*triton_grad.quantize_grad(dy_TO, w_scale_O, x_scale_T1, None))


def _check_grad(dy_TO: torch.Tensor, w_scale_O: torch.Tensor | None, x_scale_T1: torch.Tensor | None) -> None:
    check_features(dy_TO, "dy")
    if dy_TO.dim() != 2:
        raise ValueError(f"dy of shape {list(dy_TO.shape)} must be [T, O]")
    num_tokens, num_outputs = dy_TO.shape
    if w_scale_O is not None and w_scale_O.shape != (num_outputs,):
        raise ValueError(f"w_scale has shape {list(w_scale_O.shape)}: it must have one value for each of {num_outputs}")
    if x_scale_T1 is not None and x_scale_T1.shape != (num_tokens, 1):
        raise ValueError(f"x_scale of shape {list(x_scale_T1.shape)} must be [{num_tokens}, 1]: it needs one group")


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
    check_codes(grad.codes_TO, w_codes_IO)
    num_inputs, num_outputs = len(w_codes_IO), grad.codes_TO.shape[1]
    if w_codes_IO.shape[1] not in {num_outputs, padded_length(num_outputs)}:
        raise ValueError(f"w_codes of shape {list(w_codes_IO.shape)} must be [I, O] with O = {num_outputs}")
    w_scale = grad.scale_T1.new_ones(1) if w_scale is None else w_scale
    check_groups(len(w_scale), num_inputs, "inputs")
    w_scale_I = w_scale.unsqueeze(1).expand(-1, num_inputs // len(w_scale)).flatten()
    return float8_matmul(grad.codes_TO, grad.scale_T1, w_codes_IO[:, :num_outputs], w_scale_I, fast_accum=fast_accum)


@torch.no_grad()
def weight_grad(
    grad: QuantizedGrad, x_codes_TI: torch.Tensor, w_scale_O: torch.Tensor | None = None, *, fast_accum: bool = True
) -> torch.Tensor:
    """Gradient of a linear's weight: dW = dY^T @ X with exact activation codes (README eq. 5 and 6).

    Args:
        grad: from :func:`quantize_grad`, with the token scales of the activations.
        x_codes_TI: activation codes, e4m3 [T, I].
        w_scale_O: fp32 [O], as given to :func:`quantize_grad`; None where none was.
        fast_accum: see the module.

    Returns:
        bf16 [O, I]; NaN where a token of dY was not finite.

    Raises:
        TypeError: activation codes that are not e4m3.
        ValueError: a gradient rounded without the activations' scales, or shapes that do not fit.
    """
    if grad.power_T1 is None:
        raise ValueError("the gradient was rounded for the input gradient alone: pass x_scale to quantize_grad")
    check_codes(grad.codes_TO, x_codes_TI)
    (num_tokens, num_outputs), num_inputs = grad.codes_TO.shape, x_codes_TI.shape[1]
    if len(x_codes_TI) != num_tokens:
        raise ValueError(f"x_codes of shape {list(x_codes_TI.shape)} must be [{num_tokens}, I]")
    if not x_codes_TI.is_cuda:
        x_columns_IP = shifted_columns_reference(x_codes_TI, grad.power_T1, grad.largest_1)
    else:
        from bitmoe_kernels.ternary_gemm import triton_columns

        x_columns_IP = x_codes_TI.new_empty(num_inputs, padded_length(num_tokens))
        triton_columns.transpose_codes(x_codes_TI, x_columns_IP, grad.power_T1, grad.largest_1)
    scale_1 = grad.largest_1 / LARGEST_SHIFT
    scale_O1 = (scale_1 if w_scale_O is None else scale_1 / w_scale_O).expand(num_outputs).unsqueeze(1)
    one = grad.scale_T1.new_ones(1)
    return float8_matmul(transpose_codes(grad.codes_TO), scale_O1, x_columns_IP, one, fast_accum=fast_accum)


@torch.no_grad()
def int8_weight_grad(dy_TO: torch.Tensor, x_codes_TI: torch.Tensor, x_scale_T1: torch.Tensor) -> torch.Tensor:
    """Gradient of a linear's weight: dW = dY^T @ X with exact INT8 activation codes (README eq. 7 and 8).

    Args:
        dy_TO: [T, O], bf16, fp16, fp32 or fp64; not rounded yet.
        x_codes_TI: activation codes, int8 [T, I].
        x_scale_T1: their scales [T, 1].

    Returns:
        [O, I] in the dtype of ``dy_TO``; NaN for an output whose gradient is not finite somewhere.

    Raises:
        TypeError: ``dy_TO`` not floating point, or codes that are not int8.
        ValueError: shapes that do not fit.
    """
    _check_grad(dy_TO, None, x_scale_T1)
    check_int8_codes(x_codes_TI, len(dy_TO))
    (num_tokens, num_outputs), num_inputs = dy_TO.shape, x_codes_TI.shape[1]
    if not num_tokens:
        return dy_TO.new_zeros(num_outputs, num_inputs)
    x_columns_IP = transpose_codes(x_codes_TI)
    if not runs_triton(dy_TO):
        return int8_outer_reference(*quantize_columns_reference(dy_TO, x_scale_T1), x_columns_IP).to(dy_TO.dtype)
    from bitmoe_kernels.ternary_gemm.triton_grad_columns import quantize_columns
    from bitmoe_kernels.ternary_gemm.triton_outer import outer

    dy_columns_OP = x_codes_TI.new_empty(num_outputs, x_columns_IP.shape[1])
    scale_CO = x_scale_T1.new_empty(-(-num_tokens // CHUNK), num_outputs)
    quantize_columns(rows_contiguous(dy_TO), x_scale_T1, dy_columns_OP, scale_CO)
    dw_1OI = dy_TO.new_empty(1, num_outputs, num_inputs)
    outer(dy_columns_OP, scale_CO, x_columns_IP, None, dw_1OI)
    return dw_1OI[0]


def check_int8_codes(x_codes_RI: torch.Tensor, num_rows: int) -> None:
    """Raise unless these are int8 [R, I]."""
    if x_codes_RI.dtype != torch.int8:
        raise TypeError(f"x_codes must be int8, got {x_codes_RI.dtype}")
    if x_codes_RI.dim() != 2 or len(x_codes_RI) != num_rows:
        raise ValueError(f"x_codes of shape {list(x_codes_RI.shape)} must be [{num_rows}, I]")
