"""Per-token activation quantizers in Triton: codes and scale equal to reference.py bit for bit.

What      README eq. 1-3, one launch each: x is read once, codes and scale are written once.
Contract  bf16, fp16 or fp32; any sizes; x is made contiguous. The device of x must have Triton, or Triton's
          interpreter must be on (TRITON_INTERPRET=1 before Triton is imported).
Tiling    a tile holds whole rows in registers, 32 elements a thread: about 4096 elements and 4 warps, or one row of
          up to 32768 with up to 32 warps. Groups are rows: [T, G * d] is [T * G, d]. The row length is a constant
          of the compiled kernel, so that rows divisible by 8 get 16-byte loads.
Numerics  fp32; the sum of INT4's absmean fp64, as in the reference. The quotient x / scale is correctly rounded.
Not here  fp64 input, argument checks and dispatch (op.py).
"""

# Shapes: T = tokens, D = features, G = groups of d = D / G features, R = T * G rows of a tile's view [R, d].

import math

import torch
import triton
import triton.language as tl

from bitmoe_kernels.act_quant.reference import MIN_MAGNITUDE

# Adding 1.5 * 2^23 to a float below 2^22 leaves it rounded, half to even, in the low bits of the sum.
ROUNDING = tl.constexpr(1.5 * 2**23)
_MIN_MAGNITUDE = tl.constexpr(MIN_MAGNITUDE)
FORMAT_LEVELS = {"int4": math.sqrt(7), "int8": 127.0, "fp4": 12.0}
_TILE_ELEMENTS = 4096


def row_tile(num_features: int) -> dict[str, int]:
    """Launch constants of a tile of whole rows of ``num_features``: 32 elements a thread."""
    block_features = triton.next_power_of_2(num_features)
    block_rows = max(1, _TILE_ELEMENTS // block_features)
    num_warps = min(32, block_rows * block_features // 1024)
    return {"BLOCK_ROWS": block_rows, "BLOCK_FEATURES": block_features, "num_warps": num_warps}


def quantize_triton(x_TD: torch.Tensor, num_format: str, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each token and group.

    Args:
        x_TD: activations [..., D], bf16, fp16 or fp32.
        num_format: int4 (absmean), int8 or fp4 (absmax).
        groups: equal contiguous blocks of the D features.

    Returns:
        codes int8 [..., D] and scale fp32 [..., groups].
    """
    x_TD = x_TD.contiguous()
    codes_TD = torch.empty_like(x_TD, dtype=torch.int8)
    scale_TG = torch.empty(*x_TD.shape[:-1], groups, dtype=torch.float32, device=x_TD.device)
    if num_rows := scale_TG.numel():
        num_features = x_TD.shape[-1] // groups
        tile = row_tile(num_features)
        with torch.cuda.device_of(x_TD):
            _act_quant_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
                x_TD, codes_TD, scale_TG, num_rows, num_features, num_format, FORMAT_LEVELS[num_format], **tile
            )
    return codes_TD, scale_TG


def int8_codes_triton(x_TD: torch.Tensor, scale_TG: torch.Tensor) -> torch.Tensor:
    """INT8 codes [..., D] of bf16, fp16 or fp32 ``x_TD`` under given fp32 scales [..., G]."""
    x_TD, scale_TG = x_TD.contiguous(), scale_TG.contiguous()
    codes_TD = torch.empty_like(x_TD, dtype=torch.int8)
    if num_rows := scale_TG.numel():
        num_features = x_TD.shape[-1] // scale_TG.shape[-1]
        tile = row_tile(num_features)
        with torch.cuda.device_of(x_TD):
            _int8_codes_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
                x_TD, scale_TG, codes_TD, num_rows, num_features, **tile
            )
    return codes_TD


@triton.jit
def tile_offsets(num_rows, NUM_FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    """Rows [BR] of this program, their elements' offsets [BR, BF] and which of both exist."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    features = tl.arange(0, BLOCK_FEATURES)
    mask_rows = rows < num_rows
    mask = mask_rows[:, None] & (features < NUM_FEATURES)[None, :]
    return rows, mask_rows, rows[:, None] * NUM_FEATURES + features[None, :], mask


@triton.jit
def row_scales(x, NUM_FEATURES: tl.constexpr, FORMAT: tl.constexpr, LEVELS: tl.constexpr):
    """Scale [BR] of rows fp32 [BR, BF] that are 0 past their end; NaN where a row is not finite."""
    if FORMAT == "int4":
        magnitude = (tl.sum(tl.abs(x).to(tl.float64), axis=1) / NUM_FEATURES).to(tl.float32)
    else:
        # As integers, magnitudes keep their order and NaN is above Inf: unlike a float maximum, it is not lost.
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        magnitude = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.maximum(magnitude, _MIN_MAGNITUDE), tl.full(magnitude.shape, LEVELS, tl.float32))
    return tl.where(magnitude < float("inf"), scale, float("nan"))


@triton.jit
def round_to_int8(ratio):
    """Nearest integer, half to even, of a ratio within int8; a NaN gives a code without meaning."""
    return (ratio + ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def row_codes(x, scale, FORMAT: tl.constexpr):
    """Codes int8 [BR, BF] of rows fp32 under their own scales [BR]; 0 where the scale is NaN."""
    ratio = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    if FORMAT == "fp4":
        # Spacing of twice the E2M1 grid: 1 below 4, 2 below 8, then 4. Rounding to it, as round_to_int8 does to 1.
        size = tl.abs(ratio)
        rounding = tl.where(size < 4, ROUNDING, tl.where(size < 8, 2 * ROUNDING, 4 * ROUNDING))
        codes = round_to_int8((ratio + rounding) - rounding)
    elif FORMAT == "int4":
        codes = round_to_int8(tl.minimum(tl.maximum(ratio, -8.0), 7.0))
    else:
        # The largest ratio is 127 and a rounding error: nothing to clip.
        codes = round_to_int8(ratio)
    return tl.where((scale == scale)[:, None], codes, 0)


@triton.jit
def _act_quant_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    num_rows,
    NUM_FEATURES: tl.constexpr,
    FORMAT: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    rows, mask_rows, offs, mask = tile_offsets(num_rows, NUM_FEATURES, BLOCK_ROWS, BLOCK_FEATURES)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    scale = row_scales(x, NUM_FEATURES, FORMAT, LEVELS)
    tl.store(scale_ptr + rows, scale, mask=mask_rows)
    tl.store(codes_ptr + offs, row_codes(x, scale, FORMAT), mask=mask)


@triton.jit
def _int8_codes_kernel(
    x_ptr,
    scale_ptr,
    codes_ptr,
    num_rows,
    NUM_FEATURES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    rows, mask_rows, offs, mask = tile_offsets(num_rows, NUM_FEATURES, BLOCK_ROWS, BLOCK_FEATURES)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + rows, mask=mask_rows, other=1.0)
    ratio = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    codes = round_to_int8(tl.minimum(tl.maximum(ratio, -128.0), 127.0))
    tl.store(codes_ptr + offs, tl.where(ratio == ratio, codes, 0), mask=mask)
