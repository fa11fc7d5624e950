"""Triton kernels that round dY to e4m3: by row alone, or by row and by column.

What      By row alone: whole rows in registers (the tiles of ``act_quant``), so that dY is read once. By column, too:
          the scale of a column spans all tokens, which no tile can know on its own, hence two reads of tiles of
          128 x 128, largest magnitudes and then codes.
Contract  dY bf16, fp16 or fp32, scales fp32, all contiguous; outputs are allocated by the caller.
Numerics  the bits of reference.py.
Not here  checks and dispatch (backward.py); dY of routed experts by column (grouped_ternary_gemm/triton_codes.py).
"""

import torch
import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import (
    IS_INTERPRETED,
    float8_bytes,
    row_tile,
    store_row_codes,
    tile_offsets,
    to_float32,
)
from bitmoe_kernels.ternary_gemm.reference import E4M3_LEVELS, MIN_ABSMAX
from bitmoe_kernels.ternary_gemm.triton_kernels import COPY_TILE

# Shapes: T = tokens, P = T padded with zeros, O = outputs, E = experts.

_LEVELS = tl.constexpr(E4M3_LEVELS)
_MIN_ABSMAX = tl.constexpr(MIN_ABSMAX)


@triton.jit
def largest_magnitude(x, axis: tl.constexpr):
    """max |x| along an axis; Inf where a number is not finite."""
    # As integers, magnitudes keep their order and NaN is above Inf: unlike a float maximum, it is not lost.
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis)
    return tl.minimum(bits, 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_scale(absmax):
    """The scale of numbers up to ``absmax`` and its reciprocal; NaN and 0 where that is Inf."""
    absmax = tl.maximum(absmax, _MIN_ABSMAX)
    levels = tl.full(absmax.shape, _LEVELS, tl.float32)
    scale = tl.where(absmax < float("inf"), tl.div_rn(absmax, levels), float("nan"))
    return scale, tl.div_rn(levels, absmax)


@triton.jit
def e4m3_bytes(x):
    """The bytes, as int8, of fp32 ``x`` rounded half to even to e4m3; NaN has no meaning."""
    if IS_INTERPRETED:
        # A sum without bits below the last place of e4m3: 2**-3 of the power of 2 below |x|, 2**-9 at least.
        bits = x.to(tl.int32, bitcast=True)
        rounding = tl.maximum((bits & 0x7F800000).to(tl.float32, bitcast=True), 2.0**-6) * (1.5 * 2.0**20)
        rounded = tl.abs((x + rounding) - rounding)
        x = (rounded.to(tl.int32, bitcast=True) | ((bits >> 31) << 31)).to(tl.float32, bitcast=True)
    return float8_bytes(x)


@triton.jit
def _quantize_rows_kernel(
    dy_ptr,
    w_scale_ptr,
    ends_ptr,
    rows_ptr,
    row_scale_ptr,
    num_rows,
    num_experts,
    NUM_OUTPUTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    if EXPERTS is not None:
        num_rows = tl.load(ends_ptr + num_experts - 1)
    rows, mask_rows, offs, mask = tile_offsets(num_rows, NUM_OUTPUTS, BLOCK_ROWS, BLOCK_FEATURES)
    dy = to_float32(tl.load(dy_ptr + offs, mask=mask, other=0.0))
    if w_scale_ptr is not None:
        first = tl.zeros((BLOCK_ROWS,), dtype=tl.int64)
        if EXPERTS is not None:
            offs_e = tl.arange(0, EXPERTS)
            ends = tl.load(ends_ptr + offs_e, mask=offs_e < num_experts, other=0x7FFFFFFF)
            first += tl.sum((ends[None, :] <= rows[:, None]).to(tl.int32), axis=1) * NUM_OUTPUTS
        offs_w = first[:, None] + tl.arange(0, BLOCK_FEATURES)[None, :]
        dy *= tl.load(w_scale_ptr + offs_w, mask=mask, other=0.0)
    scale, reciprocal = e4m3_scale(largest_magnitude(dy, 1))
    tl.store(row_scale_ptr + rows, scale, mask=mask_rows)
    store_row_codes(rows_ptr + offs, e4m3_bytes(dy * reciprocal[:, None]), scale, mask)


def quantize_rows(
    dy_TO: torch.Tensor,
    w_scale: torch.Tensor | None,
    ends_E: torch.Tensor | None,
    rows_TO: torch.Tensor,
    row_scale_T1: torch.Tensor,
) -> None:
    """Write e4m3 codes and scales of rows, times ``w_scale`` [O], or [E, O] where ``ends_E`` says whose rows they are.

    Rows past ``ends_E[-1]`` are neither read nor written.
    """
    num_rows, num_outputs = dy_TO.shape
    if not num_rows:
        return
    tile = row_tile(num_outputs)
    _quantize_rows_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
        dy_TO,
        w_scale,
        ends_E,
        rows_TO.view(torch.int8),
        row_scale_T1,
        num_rows,
        0 if ends_E is None else len(ends_E),
        NUM_OUTPUTS=num_outputs,
        EXPERTS=None if ends_E is None else triton.next_power_of_2(len(ends_E)),
        **tile,
    )


@triton.jit
def load_tile(dy_ptr, offs_t, offs_o, mask_t, mask_o, num_outputs):
    """A tile [T, O] of dY in fp32."""
    # Not ``to_float32``: Triton transposes the 16 bits by whole matrices, but not across inline assembly.
    ptrs = dy_ptr + offs_t[:, None].to(tl.int64) * num_outputs + offs_o[None, :]
    return tl.load(ptrs, mask=mask_t[:, None] & mask_o[None, :], other=0.0).to(tl.float32)


@triton.jit
def _grad_absmax_kernel(
    dy_ptr,
    w_scale_ptr,
    x_scale_ptr,
    row_absmax_ptr,
    column_absmax_ptr,
    num_tokens,
    num_outputs,
    BLOCK: tl.constexpr,
):
    offs_t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offs_o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_t = offs_t < num_tokens
    mask_o = offs_o < num_outputs
    dy = load_tile(dy_ptr, offs_t, offs_o, mask_t, mask_o, num_outputs)
    rows = dy
    if w_scale_ptr is not None:
        rows = dy * tl.load(w_scale_ptr + offs_o, mask=mask_o, other=0.0)[None, :]
    tl.atomic_max(row_absmax_ptr + offs_t, largest_magnitude(rows, 1), mask=mask_t, sem="relaxed")
    columns = dy * tl.load(x_scale_ptr + offs_t, mask=mask_t, other=0.0)[:, None]
    tl.atomic_max(column_absmax_ptr + offs_o, largest_magnitude(columns, 0), mask=mask_o, sem="relaxed")


@triton.jit
def tile_codes(x, reciprocal):
    """Bytes of e4m3 codes of ``x``; 0 where the reciprocal of the scale is 0."""
    return e4m3_bytes(tl.where(reciprocal > 0, x * reciprocal, 0.0))


@triton.jit
def _quantize_grad_kernel(
    dy_ptr,
    w_scale_ptr,
    x_scale_ptr,
    row_absmax_ptr,
    column_absmax_ptr,
    rows_ptr,
    row_scale_ptr,
    columns_ptr,
    column_scale_ptr,
    num_tokens,
    num_outputs,
    padded_tokens,
    BLOCK: tl.constexpr,
):
    pid_o = tl.program_id(0)
    pid_t = tl.program_id(1)
    offs_t = pid_t * BLOCK + tl.arange(0, BLOCK)
    offs_o = pid_o * BLOCK + tl.arange(0, BLOCK)
    mask_t = offs_t < num_tokens
    mask_o = offs_o < num_outputs
    dy = load_tile(dy_ptr, offs_t, offs_o, mask_t, mask_o, num_outputs)
    rows = dy
    if w_scale_ptr is not None:
        rows = dy * tl.load(w_scale_ptr + offs_o, mask=mask_o, other=0.0)[None, :]
    scale, reciprocal = e4m3_scale(tl.load(row_absmax_ptr + offs_t, mask=mask_t, other=0.0))
    row_ptrs = rows_ptr + offs_t[:, None].to(tl.int64) * num_outputs + offs_o[None, :]
    tl.store(row_ptrs, tile_codes(rows, reciprocal[:, None]), mask=mask_t[:, None] & mask_o[None, :])
    if pid_o == 0:
        tl.store(row_scale_ptr + offs_t, scale, mask=mask_t)
    columns = dy * tl.load(x_scale_ptr + offs_t, mask=mask_t, other=0.0)[:, None]
    scale, reciprocal = e4m3_scale(tl.load(column_absmax_ptr + offs_o, mask=mask_o, other=0.0))
    column_ptrs = columns_ptr + offs_o[:, None].to(tl.int64) * padded_tokens + offs_t[None, :]
    mask = mask_o[:, None] & (offs_t < padded_tokens)[None, :]
    tl.store(column_ptrs, tl.trans(tile_codes(columns, reciprocal[None, :])), mask=mask)
    if pid_t == 0:
        tl.store(column_scale_ptr + offs_o, scale, mask=mask_o)


def quantize_rows_and_columns(
    dy_TO: torch.Tensor,
    w_scale_O: torch.Tensor | None,
    x_scale_T1: torch.Tensor,
    rows_TO: torch.Tensor,
    row_scale_T1: torch.Tensor,
    columns_OP: torch.Tensor,
    column_scale_O1: torch.Tensor,
) -> None:
    """Write e4m3 codes and scales of rows, times ``w_scale_O``, and of columns, times ``x_scale_T1``."""
    num_tokens, num_outputs = dy_TO.shape
    padded_tokens = columns_OP.shape[1]
    absmax = dy_TO.new_zeros(num_tokens + num_outputs, dtype=torch.float32)
    inputs = (dy_TO, w_scale_O, x_scale_T1, absmax[:num_tokens], absmax[num_tokens:])
    grid = (triton.cdiv(num_outputs, COPY_TILE), max(1, triton.cdiv(padded_tokens, COPY_TILE)))
    _grad_absmax_kernel[grid](*inputs, num_tokens, num_outputs, BLOCK=COPY_TILE, num_warps=8)
    _quantize_grad_kernel[grid](
        *inputs,
        rows_TO.view(torch.int8),
        row_scale_T1,
        columns_OP.view(torch.int8),
        column_scale_O1,
        num_tokens,
        num_outputs,
        padded_tokens,
        BLOCK=COPY_TILE,
        num_warps=8,
    )
