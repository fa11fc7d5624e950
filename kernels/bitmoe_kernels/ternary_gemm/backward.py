"""8-bit backward of a ternary linear: dY is rounded, the codes of weights and activations stay exact.

``quantize_grad`` rounds dY twice in one go: per token for the input gradient, and per output channel, with the
token scales of the activations folded in, for the weight gradient. Scales then never lie along the contracted
dimension. Its users are plain functions; the autograd function belongs to the layer that owns the linear.

FP8 sums are kept in the tensor cores (``fast_accum``), where they have about 14 significant bits. Simulated over 8192
tokens, that lets the error grow from 2.65 % of the norm (rounding of dY alone) to 2.70 %.
"""

from typing import NamedTuple

import torch

from bitmoe_kernels.ternary_gemm.float8_matmul import float8_matmul
from bitmoe_kernels.ternary_gemm.op import CODE_DTYPES, check_codes, rows_contiguous
from bitmoe_kernels.ternary_gemm.reference import (
    LEVELS,
    MIN_ABSMAX,
    padded_length,
    quantize_grad_reference,
    weight_grad_reference,
)
from bitmoe_kernels.validation import check_features, check_groups

# Shapes: T = tokens, P = T rounded up to 16, I = inputs, O = outputs of the linear, G = groups of inputs,
#         C = blocks of tokens.

# int8 has no exponent: one outlying token coarsens its whole block (e4m3 can span all tokens). With token sizes spread
# log-normally by a factor e, 512 tokens round by 2.4 % of the norm, 1024 by 2.9 %, 8192 by 4.9 %, e4m3 by 2.6 %;
# smaller blocks cost rescaling in the product. A multiple of the kernels' tile.
INT8_BLOCK_TOKENS = 1024


class QuantizedGrad(NamedTuple):
    """dY in the two forms its products need; ``x ~ codes * scale``."""

    rows_TO: torch.Tensor
    """e4m3 [T, O]: dY, times the weight scale per output where there is one."""
    row_scale_T1: torch.Tensor
    """fp32 [T, 1]."""
    columns_GOP: torch.Tensor
    """e4m3 or int8 [G, O, P]: dY times the token scale of each group of inputs, transposed."""
    column_scale_GOC: torch.Tensor
    """fp32 [G, O, C]."""
    block_tokens: int
    """Tokens that share a column scale; the last of the C blocks may have fewer."""


@torch.no_grad()
def quantize_grad(
    dy_TO: torch.Tensor,
    x_scale_TG: torch.Tensor,
    w_scale_O: torch.Tensor | None = None,
    column_dtype: torch.dtype = torch.float8_e4m3fn,
) -> QuantizedGrad:
    """Round the gradient of a linear's output for both backward products (README eq. 2 and 3).

    Args:
        dy_TO: [T, O], bf16, fp16 or fp32.
        x_scale_TG: fp32 [T, G], the token scales of the forward.
        w_scale_O: fp32 [O] where the weights have a scale per output row: folded into the rows. None where
            they have one scale, or one per group of inputs: pass it to :func:`input_grad`.
        column_dtype: the type of the activations' transposed codes: e4m3 for INT4, int8 for INT8.

    Returns:
        The codes and scales. A row or column that holds NaN or Inf gets a NaN scale and codes 0.

    Raises:
        TypeError: ``dy_TO`` not floating point, or an unknown ``column_dtype``.
        ValueError: shapes that do not fit.
    """
    check_features(dy_TO, "dy")
    if column_dtype not in CODE_DTYPES:
        raise TypeError(f"column_dtype must be int8 or float8_e4m3fn, got {column_dtype}")
    if dy_TO.dim() != 2 or x_scale_TG.dim() != 2 or len(x_scale_TG) != len(dy_TO):
        raise ValueError(f"dy {list(dy_TO.shape)} and x_scale {list(x_scale_TG.shape)} must be [T, O] and [T, groups]")
    (num_tokens, num_outputs), num_groups = dy_TO.shape, x_scale_TG.shape[1]
    if w_scale_O is not None and w_scale_O.shape != (num_outputs,):
        raise ValueError(f"w_scale has shape {list(w_scale_O.shape)}: it must have one value for each of {num_outputs}")
    padded_tokens = padded_length(num_tokens)
    block_tokens = INT8_BLOCK_TOKENS if column_dtype == torch.int8 else max(padded_tokens, 1)
    if not dy_TO.is_cuda:
        return QuantizedGrad(
            *quantize_grad_reference(dy_TO, x_scale_TG, w_scale_O, column_dtype, block_tokens), block_tokens
        )
    from bitmoe_kernels.ternary_gemm import triton_kernels

    grad = QuantizedGrad(
        dy_TO.new_empty(num_tokens, num_outputs, dtype=torch.float8_e4m3fn),
        dy_TO.new_empty(num_tokens, 1, dtype=torch.float32),
        dy_TO.new_empty(num_groups, num_outputs, padded_tokens, dtype=column_dtype),
        dy_TO.new_empty(num_groups, num_outputs, -(-num_tokens // block_tokens), dtype=torch.float32),
        block_tokens,
    )
    levels = (LEVELS[torch.float8_e4m3fn], LEVELS[column_dtype])
    triton_kernels.quantize_grad(
        rows_contiguous(dy_TO), x_scale_TG, w_scale_O, block_tokens, MIN_ABSMAX, levels, *grad[:4]
    )
    return grad


@torch.no_grad()
def input_grad(
    grad: QuantizedGrad, w_codes_IO: torch.Tensor, w_scale: torch.Tensor | None = None, *, fast_accum: bool = True
) -> torch.Tensor:
    """Gradient of a linear's input: dX = dY @ W with exact ternary W (README eq. 4).

    Args:
        grad: from :func:`quantize_grad`.
        w_codes_IO: transposed weight codes, e4m3 [I, O], from :func:`k_major_codes` (padding of O is dropped).
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
        grad: from :func:`quantize_grad`, with columns of the type of ``x_codes_IP``.
        x_codes_IP: transposed activation codes, e4m3 or int8 [I, P], from :func:`k_major_codes`.
        fast_accum: see the module; int8 sums are exact always.

    Returns:
        bf16 [O, I].

    Raises:
        TypeError: codes of different types.
        ValueError: shapes that do not fit.
    """
    num_groups, num_outputs, padded_tokens = grad.columns_GOP.shape
    check_codes(grad.columns_GOP[0], x_codes_IP)
    num_inputs = len(x_codes_IP)
    check_groups(num_groups, num_inputs, "inputs")
    if x_codes_IP.shape[1] != padded_tokens:
        raise ValueError(f"x_codes of shape {list(x_codes_IP.shape)} must be [I, {padded_tokens}]")
    if padded_tokens == 0:
        return grad.row_scale_T1.new_zeros(num_outputs, num_inputs, dtype=torch.bfloat16)
    if not x_codes_IP.is_cuda:
        return weight_grad_reference(grad.columns_GOP, grad.column_scale_GOC, grad.block_tokens, x_codes_IP)
    x_codes_GiP = x_codes_IP.unflatten(0, (num_groups, -1))
    if x_codes_IP.dtype == torch.float8_e4m3fn:
        one = grad.row_scale_T1.new_ones(1)
        operands = zip(grad.columns_GOP, grad.column_scale_GOC, x_codes_GiP, strict=True)
        parts = [float8_matmul(dy, scale, x, one, fast_accum=fast_accum) for dy, scale, x in operands]
        return parts[0] if num_groups == 1 else torch.cat(parts, dim=1)
    from bitmoe_kernels.ternary_gemm import triton_kernels

    dw_OI = x_codes_IP.new_empty(num_outputs, num_inputs, dtype=torch.bfloat16)
    triton_kernels.scaled_int8_matmul(
        grad.columns_GOP,
        grad.column_scale_GOC,
        x_codes_GiP,
        None,
        min(grad.block_tokens, padded_tokens),
        dw_OI.unflatten(1, (num_groups, -1)).transpose(0, 1),
    )
    return dw_OI
