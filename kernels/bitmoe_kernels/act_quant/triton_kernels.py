"""Per-token activation quantizers in Triton: codes and scale equal to reference.py bit for bit.

What      README eq. 1-4, one launch each: what they take is read once, what they give is written once.
Contract  bf16, fp16 or fp32; any sizes; x is made contiguous. The device of x must have Triton, or Triton's
          interpreter must be on (TRITON_INTERPRET=1 before Triton is imported).
Tiling    a tile holds whole rows in registers, 64 elements a thread, so that many share what is computed once a row:
          rows of up to 2048 elements take one warp and no barrier, 32768 take 16. Groups are rows: [T, G * d] is
          [T * G, d]. The row length is a constant of the compiled kernel: rows divisible by 8 get 16-byte loads, and
          most of a tile past the end of a row costs nothing.
Numerics  the operations of the reference, one by one: multiplications are not fused with additions that round.
Not here  fp64 input, argument checks and dispatch (op.py).
"""

# Shapes: T = tokens, D = features, G = groups of d = D / G features, R = T * G rows of a tile's view [R, d].

import math

import torch
import triton
import triton.language as tl

from bitmoe_kernels.act_quant.reference import MIN_MAGNITUDE, NEIGHBOURS

_REGISTERS_PER_PROCESSOR = 65536
# Adding 1.5 * 2^23 to a float below 2^22 leaves it rounded, half to even, in the low bits of the sum.
ROUNDING = tl.constexpr(1.5 * 2**23)
_MIN_MAGNITUDE = tl.constexpr(MIN_MAGNITUDE)
_LEVELS_OF_NEIGHBOURS = tl.constexpr(NEIGHBOURS.bit_length() - 1)
IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FORMAT_LEVELS = {"int4": math.sqrt(7), "int8": 127.0, "fp4": 12.0}


def row_tile(num_features: int, elements_per_thread: int = 64) -> dict[str, int]:
    """Launch constants of a tile of whole rows of ``num_features``."""
    block_features = triton.next_power_of_2(num_features)
    block_rows = max(1, 32 * elements_per_thread // block_features)
    num_warps = min(32, block_rows * block_features // (32 * elements_per_thread))
    return {"BLOCK_ROWS": block_rows, "BLOCK_FEATURES": block_features, "num_warps": num_warps}


def held_to(registers: int, tile: dict[str, int]) -> dict[str, int]:
    """The tile with at most so many registers a thread, and no more in all than a processor has."""
    return tile | {"maxnreg": min(registers, _REGISTERS_PER_PROCESSOR // (32 * tile["num_warps"]))}


def quantize_triton(
    x_TD: torch.Tensor, num_format: str, groups: int = 1, code_dtype: torch.dtype = torch.int8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each token and group.

    Args:
        x_TD: activations [..., D], bf16, fp16 or fp32.
        num_format: int4 (absmean), int8 or fp4 (absmax).
        groups: equal contiguous blocks of the D features.
        code_dtype: int8, or e4m3 for int4 and fp4.

    Returns:
        codes [..., D] and scale fp32 [..., groups].
    """
    x_TD = x_TD.contiguous()
    codes_TD = torch.empty_like(x_TD, dtype=torch.int8)
    scale_TG = torch.empty(*x_TD.shape[:-1], groups, dtype=torch.float32, device=x_TD.device)
    if num_rows := scale_TG.numel():
        num_features = x_TD.shape[-1] // groups
        tile = row_tile(num_features)
        with torch.cuda.device_of(x_TD):
            _act_quant_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
                x_TD,
                codes_TD,
                scale_TG,
                num_rows,
                num_features,
                num_format,
                FORMAT_LEVELS[num_format],
                code_dtype == torch.float8_e4m3fn,
                enable_fp_fusion=False,
                **tile,
            )
    return codes_TD.view(code_dtype), scale_TG


def int8_codes_triton(x_TD: torch.Tensor, scale_TG: torch.Tensor) -> torch.Tensor:
    """INT8 codes [..., D] of bf16, fp16 or fp32 ``x_TD`` under given fp32 scales [..., G]."""
    x_TD, scale_TG = x_TD.contiguous(), scale_TG.contiguous()
    codes_TD = torch.empty_like(x_TD, dtype=torch.int8)
    if num_rows := scale_TG.numel():
        num_features = x_TD.shape[-1] // scale_TG.shape[-1]
        tile = row_tile(num_features)
        with torch.cuda.device_of(x_TD):
            _int8_codes_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
                x_TD, scale_TG, codes_TD, num_rows, num_features, enable_fp_fusion=False, **tile
            )
    return codes_TD


def dequantize_triton(codes_TD: torch.Tensor, scale_TG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """README eq. 4: int8 or e4m3 codes times fp32 scales, rounded to bf16, fp16 or fp32 ``dtype``, [..., D]."""
    codes_TD, scale_TG = codes_TD.contiguous(), scale_TG.contiguous()
    x_TD = torch.empty(codes_TD.shape, dtype=dtype, device=codes_TD.device)
    if num_rows := scale_TG.numel():
        num_features = codes_TD.shape[-1] // scale_TG.shape[-1]
        tile = row_tile(num_features)
        with torch.cuda.device_of(codes_TD):
            _dequantize_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
                codes_TD.view(torch.int8),
                scale_TG,
                x_TD,
                num_rows,
                num_features,
                codes_TD.dtype == torch.float8_e4m3fn,
                **tile,
            )
    return x_TD


@triton.jit
def tile_offsets(num_rows, NUM_FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    """Rows [BR] of this program, their elements' offsets [BR, BF] and which of both exist."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    features = tl.arange(0, BLOCK_FEATURES)
    mask_rows = rows < num_rows
    mask = mask_rows[:, None] & (features < NUM_FEATURES)[None, :]
    return rows, mask_rows, rows[:, None] * NUM_FEATURES + features[None, :], mask


@triton.jit
def to_float32(x):
    """``x`` in fp32, at one instruction a bf16 number (Triton's own conversion takes 1.5)."""
    if x.dtype != tl.bfloat16:
        wide = x.to(tl.float32)
    elif IS_INTERPRETED:
        # Its own conversion makes a normal number of a denormal (seen in 3.6 and 3.9).
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    return wide


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 ``x`` rounded half to even to ``dtype``.

    To 16 bits two numbers at a time: the conversion of one runs at 1/8 of the speed (sm_90).
    """
    if IS_INTERPRETED and dtype == tl.bfloat16:
        # Triton's interpreter cuts bits off, and denormals go wrong (seen in 3.6 and 3.9).
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FFFFFFF)
        rounded = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif IS_INTERPRETED:
        rounded = x.to(dtype)
    elif dtype == tl.bfloat16:
        rounded = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif dtype == tl.float16:
        rounded = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        rounded = x
    return rounded


@triton.jit
def neighbour_sums(x, LEVELS: tl.constexpr = _LEVELS_OF_NEIGHBOURS):
    """Sums of NEIGHBOURS = 2^LEVELS, fp64 [BR, BF / NEIGHBOURS], of fp32 [BR, BF], added as ``wide_sum`` adds them.

    A conversion to fp64 takes as long as 8 additions (sm_90): neighbours, which one thread holds, share one.
    """
    for _ in tl.static_range(LEVELS):
        if x.shape[1] > 1:
            even, odd = _even_and_odd(x)
            x = even + odd
    return x.to(tl.float64)


@triton.jit
def neighbour_square_sums(x):
    """The same of the squares of bf16, fp16 or fp32 ``x``."""
    wide = to_float32(x)
    if x.dtype == tl.float32 or x.shape[1] == 1:
        return neighbour_sums(wide * wide)
    # Squares of 16-bit numbers are exact in fp32, so the sum of two is rounded once either way.
    even, odd = _even_and_odd(wide)
    return neighbour_sums(tl.fma(even, even, odd * odd), _LEVELS_OF_NEIGHBOURS - 1)


@triton.jit
def _even_and_odd(x):
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def row_means(sums, NUM_FEATURES: tl.constexpr):
    """Means fp64 [BR] of sums fp64."""
    # Not a product with a Python number, which Triton rounds to fp32.
    return sums * tl.full(sums.shape, 1 / NUM_FEATURES, tl.float64)


@triton.jit
def row_scales(x, NUM_FEATURES: tl.constexpr, FORMAT: tl.constexpr, LEVELS: tl.constexpr):
    """Scale [BR] of rows [BR, BF] that are 0 past their end; NaN where a row is not finite."""
    x = to_float32(x)
    if FORMAT == "int4":
        magnitude = row_means(tl.sum(neighbour_sums(tl.abs(x)), axis=1), NUM_FEATURES).to(tl.float32)
    else:
        # As integers, magnitudes keep their order and NaN is above Inf: unlike a float maximum, it is not lost.
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        magnitude = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    return scales_of(magnitude, LEVELS)


@triton.jit
def scales_of(magnitude, LEVELS: tl.constexpr):
    """Scale [BR] of rows whose mean or largest magnitude is given; NaN where that is not finite."""
    scale = tl.div_rn(tl.maximum(magnitude, _MIN_MAGNITUDE), tl.full(magnitude.shape, LEVELS, tl.float32))
    return tl.where(magnitude < float("inf"), scale, float("nan"))


@triton.jit
def round_to_int8(ratio):
    """Nearest integer, half to even, of a ratio within int8; a NaN gives a code without meaning."""
    return (ratio + ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def finite_row_codes(x, scale, FORMAT: tl.constexpr, IS_FLOAT8: tl.constexpr):
    """Codes int8 of rows [BR, BF] under their own scales [BR], or (``IS_FLOAT8``) the bytes of 4-bit ones in e4m3.

    Without meaning where the scale is NaN.
    """
    ratio = to_float32(x) * _reciprocal(scale)[:, None]
    if FORMAT == "fp4":
        # Spacing of twice the E2M1 grid: 1 below 4, 2 below 8, then 4. Rounding to it, as to 1 below.
        size = tl.abs(ratio)
        rounding = tl.where(size < 4, 1.0, tl.where(size < 8, 2.0, 4.0)) * ROUNDING
        ratio = (ratio + rounding) - rounding
    elif FORMAT == "int4":
        ratio = _rounded_to_int4(ratio)
    # The largest ratio of int8 is 127 and a rounding error: there is nothing to clip.
    return float8_bytes(ratio) if IS_FLOAT8 else round_to_int8(ratio)


@triton.jit
def _rounded_to_int4(ratio):
    """Nearest integers from -8 to 7, half to even, in fp32; without meaning where the ratio is not finite."""
    # From 1/2 to 1 fp32 has every multiple of 2^-24: 1 - 2^-24 (8 + ratio) is rounded there as the ratio is, and where
    # the instruction saturates, at 1, the ratio is clipped at -8 without one of its own.
    if IS_INTERPRETED:
        below_1 = tl.minimum(ratio * -(2.0**-24) + (1 - 2.0**-21), 1.0)
    else:
        below_1 = tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, 0fB3800000, 0f3F7FFFF8;", "=r,r", [ratio], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.minimum(tl.fma(below_1, -(2.0**24), 2.0**24 - 8), 7.0)


@triton.jit
def _reciprocal(scale):
    """1 / scale, correctly rounded."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def float8_bytes(codes):
    """The e4m3 bytes, as int8, of codes fp32 that e4m3 holds exactly.

    Not by Triton's conversion: Triton 3.6 loses half of the numbers where one tile is converted twice (H200).
    """
    if IS_INTERPRETED:
        # 2^-120 makes the exponents of fp32 those of e4m3.
        bits = (codes * 2.0**-120).to(tl.int32, bitcast=True)
        return (((bits >> 24) & ~0x7F) | ((bits >> 20) & 0x7F)).to(tl.int8)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,r,r,r,r",
            [codes],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )


@triton.jit
def float8_numbers(codes):
    """The numbers, in fp32, whose e4m3 bytes are these int8 ``codes``."""
    # Sign, exponent and mantissa where fp32 has them; 2^120 makes up for the other bias.
    bits = codes.to(tl.int32)
    return ((bits & 0x80) << 24 | (bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def store_row_codes(ptrs, codes, scale, mask):
    """Store codes [BR, BF], and 0 for the rows whose scale [BR] is NaN."""
    # Two stores under opposite masks cost less than a choice for each element.
    is_finite = (scale == scale)[:, None]
    tl.store(ptrs, codes, mask=mask & is_finite)
    tl.store(ptrs, tl.zeros_like(codes), mask=mask & ~is_finite)


@triton.jit
def _act_quant_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    num_rows,
    NUM_FEATURES: tl.constexpr,
    FORMAT: tl.constexpr,
    LEVELS: tl.constexpr,
    IS_FLOAT8: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    rows, mask_rows, offs, mask = tile_offsets(num_rows, NUM_FEATURES, BLOCK_ROWS, BLOCK_FEATURES)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    scale = row_scales(x, NUM_FEATURES, FORMAT, LEVELS)
    tl.store(scale_ptr + rows, scale, mask=mask_rows)
    store_row_codes(codes_ptr + offs, finite_row_codes(x, scale, FORMAT, IS_FLOAT8), scale, mask)


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
    ratio = x * _reciprocal(scale)[:, None]
    codes = round_to_int8(tl.minimum(tl.maximum(ratio, -128.0), 127.0))
    tl.store(codes_ptr + offs, tl.where(ratio == ratio, codes, 0), mask=mask)


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scale_ptr,
    x_ptr,
    num_rows,
    NUM_FEATURES: tl.constexpr,
    IS_FLOAT8: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    rows, mask_rows, offs, mask = tile_offsets(num_rows, NUM_FEATURES, BLOCK_ROWS, BLOCK_FEATURES)
    codes = tl.load(codes_ptr + offs, mask=mask, other=0)
    numbers = float8_numbers(codes) if IS_FLOAT8 else codes.to(tl.float32)
    x = numbers * tl.load(scale_ptr + rows, mask=mask_rows, other=1.0)[:, None]
    tl.store(x_ptr + offs, round_to(x, x_ptr.dtype.element_ty), mask=mask)
