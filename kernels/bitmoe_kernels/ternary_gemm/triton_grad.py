"""Triton kernel of the 8-bit backward: dY rounded to e4m3 by token; and how activation codes are shifted to match it.

What      Whole rows of dY in registers (the tiles of ``act_quant``), so that it is read once; also for rows sorted by
          expert.
Contract  dY bf16, fp16 or fp32, scales fp32, codes e4m3; rows past ``ends_E[-1]`` are neither read nor written. With
          ``row_TK`` a token's codes and scale go to all rows that are copies of it: one launch instead of three.
Numerics  the bits of reference.py.
Not here  checks and dispatch (backward.py), columns (triton_columns.py).
"""

import torch
import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import (
    IS_INTERPRETED,
    float8_bytes,
    float8_numbers,
    row_tile,
    store_row_codes,
    tile_offsets,
    to_float32,
)
from bitmoe_kernels.ternary_gemm.reference import E4M3_LEVELS, LARGEST_SHIFT, MIN_ABSMAX, MIN_POWER

# Shapes: T = tokens or rows sorted by expert, K = copies of each token, O = outputs, E = experts.

_LEVELS = tl.constexpr(E4M3_LEVELS)
_MIN_ABSMAX = tl.constexpr(MIN_ABSMAX)
_MIN_POWER = tl.constexpr(MIN_POWER)
_LARGEST_SHIFT = tl.constexpr(LARGEST_SHIFT)


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
def power_scale(absmax, x_scale):
    """The scale that times ``x_scale`` is a power of 2, its reciprocal, the power; NaN, 0, Inf where absmax is Inf."""
    least = tl.div_rn(absmax * x_scale, tl.full(absmax.shape, _LEVELS, tl.float32))
    bits = tl.maximum(least, _MIN_POWER).to(tl.int32, bitcast=True)
    power = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    is_finite = absmax < float("inf")
    power = tl.where(is_finite, power, float("inf"))
    return tl.where(is_finite, tl.div_rn(power, x_scale), float("nan")), tl.div_rn(x_scale, power), power


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
def shifted_bytes(codes, shift):
    """The bytes of e4m3 codes (as int8) of integers times ``shift``, a power of 2 that broadcasts."""
    return e4m3_bytes(float8_numbers(codes) * shift)


@triton.jit
def code_shift(power_ptrs, largest, mask):
    """What the codes of tokens are multiplied by: ``power`` where the largest is LARGEST_SHIFT; 0 past them."""
    # Powers of 2: their quotient is exact, and one division is enough for all tokens. Without tokens ``largest`` is 0.
    power = tl.load(power_ptrs, mask=mask, other=0.0)
    return tl.where(mask, power * tl.div_rn(tl.full(largest.shape, _LARGEST_SHIFT, tl.float32), largest), 0.0)


@triton.jit
def _quantize_grad_kernel(
    dy_ptr,
    w_scale_ptr,
    x_scale_ptr,
    ends_ptr,
    row_ptr,
    codes_ptr,
    scale_ptr,
    power_ptr,
    largest_ptr,
    num_rows,
    num_experts,
    NUM_OUTPUTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    if EXPERTS is not None:
        num_rows = tl.load(ends_ptr + num_experts - 1)
    rows, mask_rows, offs, mask = tile_offsets(num_rows, NUM_OUTPUTS, BLOCK_ROWS, BLOCK_FEATURES)
    expert = tl.zeros((BLOCK_ROWS,), dtype=tl.int32)
    if EXPERTS is not None:
        offs_e = tl.arange(0, EXPERTS)
        ends = tl.load(ends_ptr + offs_e, mask=offs_e < num_experts, other=0x7FFFFFFF)
        expert = tl.sum((ends[None, :] <= rows[:, None]).to(tl.int32), axis=1)
    dy = to_float32(tl.load(dy_ptr + offs, mask=mask, other=0.0))
    if w_scale_ptr is not None:
        offs_w = (expert.to(tl.int64) * NUM_OUTPUTS)[:, None] + tl.arange(0, BLOCK_FEATURES)[None, :]
        dy *= tl.load(w_scale_ptr + offs_w, mask=mask, other=0.0)
    absmax = largest_magnitude(dy, 1)
    if x_scale_ptr is None:
        scale, reciprocal = e4m3_scale(absmax)
    else:
        scale, reciprocal, power = power_scale(absmax, tl.load(x_scale_ptr + rows, mask=mask_rows, other=1.0))
        tl.store(power_ptr + rows, power, mask=mask_rows)
        tl.atomic_max(largest_ptr + expert, power, mask=mask_rows, sem="relaxed")
    codes = e4m3_bytes(dy * reciprocal[:, None])
    for copy in tl.static_range(COPIES):
        if row_ptr is not None:
            row = tl.load(row_ptr + rows * COPIES + copy, mask=mask_rows, other=0).to(tl.int64)
            offs = row[:, None] * NUM_OUTPUTS + tl.arange(0, BLOCK_FEATURES)[None, :]
        else:
            row = rows
        tl.store(scale_ptr + row, scale, mask=mask_rows)
        store_row_codes(codes_ptr + offs, codes, scale, mask)


def quantize_grad(
    dy_TO: torch.Tensor,
    w_scale: torch.Tensor | None,
    x_scale_T1: torch.Tensor | None,
    ends_E: torch.Tensor | None,
    row_TK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Codes e4m3 [T, O] and scale [T, 1] of dY times ``w_scale``, [O] or (``ends_E`` says whose rows they are) [E, O].

    With ``x_scale_T1`` also the powers [T, 1] and the largest of each expert [E], or of all [1]. With int32
    ``row_TK``, which goes without ``x_scale_T1`` and ``ends_E``, codes [T * K, O] and scale [T * K, 1] of these rows.
    """
    dy_TO = dy_TO.contiguous()
    (num_rows, num_outputs), copies = dy_TO.shape, 1 if row_TK is None else row_TK.shape[1]
    codes_TO = torch.empty(num_rows * copies, num_outputs, dtype=torch.int8, device=dy_TO.device)
    scale_T1 = torch.empty(num_rows * copies, 1, dtype=torch.float32, device=dy_TO.device)
    power_T1, largest = None, None
    num_experts = 0 if ends_E is None else len(ends_E)
    if x_scale_T1 is not None:
        x_scale_T1, power_T1 = x_scale_T1.contiguous(), torch.empty_like(scale_T1)
        largest = torch.zeros(max(1, num_experts), dtype=torch.float32, device=dy_TO.device)
    if num_rows:
        tile = row_tile(num_outputs)
        with torch.cuda.device_of(dy_TO):
            _quantize_grad_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
                dy_TO,
                None if w_scale is None else w_scale.contiguous(),
                x_scale_T1,
                ends_E,
                None if row_TK is None else row_TK.contiguous(),
                codes_TO,
                scale_T1,
                power_T1,
                largest,
                num_rows,
                num_experts,
                NUM_OUTPUTS=num_outputs,
                EXPERTS=None if ends_E is None else triton.next_power_of_2(num_experts),
                COPIES=copies,
                **tile,
            )
    grad = codes_TO.view(torch.float8_e4m3fn), scale_T1
    return grad if x_scale_T1 is None else (*grad, power_T1, largest)
