"""Per-token activation quantizers in Triton: codes and scale equal to reference.py bit for bit.

What      README eq. 1-4, one launch each: what they take is read once, what they give is written once.
Contract  bf16, fp16 or fp32; any sizes; x is made contiguous. The device of x must have Triton, or Triton's
          interpreter must be on (TRITON_INTERPRET=1 before Triton is imported).
Tiling    a tile holds whole rows in registers, 64 elements a thread, so that many share what is computed once a row:
          rows of up to 2048 elements take one warp and no barrier, 32768 take 16. Groups are rows: [T, G * d] is
          [T * G, d]. The row length is a constant of the compiled kernel: rows divisible by 8 get 16-byte loads, and
          most of a tile past the end of a row costs nothing.
Numerics  fp32; the sum of INT4's absmean fp64, as in the reference. Codes are those of the correctly rounded quotient
          x / scale (`row_codes` says how it is avoided).
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
# Ratios are computed times this power of 2, so that the low part of a reciprocal keeps its bits for the largest scales.
_UNIT = tl.constexpr(2.0**32)
_MIN_MAGNITUDE = tl.constexpr(MIN_MAGNITUDE)
IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FORMAT_LEVELS = {"int4": math.sqrt(7), "int8": 127.0, "fp4": 12.0}


def row_tile(num_features: int, elements_per_thread: int = 64) -> dict[str, int]:
    """Launch constants of a tile of whole rows of ``num_features``."""
    block_features = triton.next_power_of_2(num_features)
    block_rows = max(1, 32 * elements_per_thread // block_features)
    num_warps = min(32, block_rows * block_features // (32 * elements_per_thread))
    return {"BLOCK_ROWS": block_rows, "BLOCK_FEATURES": block_features, "num_warps": num_warps}


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
                x_TD, scale_TG, codes_TD, num_rows, num_features, **tile
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
    if x.dtype == tl.bfloat16 and not IS_INTERPRETED:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 ``x`` rounded half to even to ``dtype``.

    To 16 bits two numbers at a time: the conversion of one runs at 1/8 of the speed (sm_90).
    """
    if IS_INTERPRETED:
        if dtype == tl.bfloat16:
            # Triton's interpreter cuts bf16 off (seen in 3.6 and 3.9): round the bits before it does.
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
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
def row_scales(x, NUM_FEATURES: tl.constexpr, FORMAT: tl.constexpr, LEVELS: tl.constexpr):
    """Scale [BR] of rows [BR, BF] that are 0 past their end; NaN where a row is not finite."""
    x = to_float32(x)
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
    """Codes int8 of rows [BR, BF] under their own scales [BR]; 0 where the scale is NaN."""
    return tl.where((scale == scale)[:, None], finite_row_codes(x, scale, FORMAT, False, None), 0)


@triton.jit
def finite_row_codes(x, scale, FORMAT: tl.constexpr, IS_FLOAT8: tl.constexpr, NUM_FEATURES: tl.constexpr):
    """The same where no scale is NaN, else without meaning; if ``IS_FLOAT8``, the bytes of e4m3 codes.

    ``NUM_FEATURES`` is the length of the rows, or None if it is not known.
    """
    ratio = _row_ratios(x, scale)
    if FORMAT == "fp4":
        # Spacing of twice the E2M1 grid: 1 below 4, 2 below 8, then 4. Rounding to it, as to 1 below.
        size = tl.abs(ratio)
        rounding = tl.where(size < 4 * _UNIT, _UNIT, tl.where(size < 8 * _UNIT, 2 * _UNIT, 4 * _UNIT)) * ROUNDING
        ratio = (ratio + rounding) - rounding
    # For int8 the largest ratio is 127 and a rounding error: nothing to clip. For int4 it is sqrt(7) * NUM_FEATURES:
    # codes of short rows fit into 16 bits, where two are clipped at a time.
    is_short: tl.constexpr = NUM_FEATURES is not None and NUM_FEATURES <= 12000
    clips_pairs: tl.constexpr = is_short and not IS_FLOAT8 and not IS_INTERPRETED
    if FORMAT == "int4" and not clips_pairs:
        ratio = tl.minimum(tl.maximum(ratio, -8 * _UNIT), 7 * _UNIT)
    rounded = ratio + ROUNDING * _UNIT
    if IS_FLOAT8:
        # Exact: the codes of the ratios, as numbers.
        codes = float8_bytes(_fma(rounded, tl.full(x.shape, 1 / _UNIT, tl.float32), -ROUNDING))
    elif FORMAT == "int4" and clips_pairs:
        codes = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, least, largest;
            mov.b32 least, 0xfff8fff8;
            mov.b32 largest, 0x00070007;
            prmt.b32 low, $1, $2, 0x5410;
            prmt.b32 high, $3, $4, 0x5410;
            min.s16x2 low, low, largest;
            min.s16x2 high, high, largest;
            max.s16x2 low, low, least;
            max.s16x2 high, high, least;
            prmt.b32 $0, low, high, 0x6420;
            }""",
            "=r,r,r,r,r",
            [rounded],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        codes = rounded.to(tl.int32, bitcast=True).to(tl.int8)
    return codes


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
def _row_ratios(x, scale):
    """_UNIT * x / scale, fp32 [BR, BF], of rows [BR, BF] under their own scales [BR], as row_scales gives them.

    Correctly rounded for fp32. For bf16 and fp16 two instructions give a result that may be wrong by a bit, but falls
    on the same side of each tie h of two codes as the correctly rounded quotient, or on h where that does: the code
    is the same.

    Why. high + low is the reciprocal to 48 bits, so the sum misses x / scale by less than 2^-21 steps of floats beside
    h before it is rounded. It is rounded otherwise only if a midpoint of two floats lies between, and only those beside
    h matter: m = h +- u, where u is half a step. Let h = H * 2^j * u, H odd; then 2^24 <= H * 2^j < 2^25 and j >= 17.
    Let S be the integer of 24 bits in ``scale``, and count x in units of u * scale / S: x = (H * 2^j +- 1) * S + t with
    |t| < 2^4. As x, of 11 bits, is a multiple of 2^j, S = A * 2^j -+ t for some A, 0 < A <= 2^(24 - j) <= H, and
    x = H * A * 2^(2 j) -+ (H * t - A) * 2^j. As x is also a multiple of some power of 2 above 2^(j + 11) * H, and
    |H * t - A| is below both 2^11 * H and 2^j, H * t = A <= H. So t = 1 and A = H = 2^(24 - j), which is odd for
    h = 1/2 only: then S = 2^24 - 1, x is a power of 2, and the sum is x * high, correctly rounded, because low is (and
    so is less than half a step of high).
    """
    if x.dtype == tl.float32:
        return tl.div_rn(x, tl.broadcast_to((scale * (1 / _UNIT))[:, None], x.shape))
    unit = tl.full(scale.shape, _UNIT, tl.float32)
    high = tl.div_rn(unit, scale)
    low = tl.div_rn(_fma(-scale, high, unit), scale)
    x = to_float32(x)
    return _fma(x, tl.broadcast_to(high[:, None], x.shape), x * low[:, None])


@triton.jit
def _fma(x, y, z):
    """x * y + z in fp32, rounded once."""
    if IS_INTERPRETED:
        # Triton's interpreter rounds the product too. In fp64 it is exact.
        return (x.to(tl.float64) * y.to(tl.float64) + z).to(tl.float32)
    return tl.fma(x, y, z)


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
    store_row_codes(codes_ptr + offs, finite_row_codes(x, scale, FORMAT, IS_FLOAT8, NUM_FEATURES), scale, mask)


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
    # Given scales may be of any size: the quotient is divided in full.
    ratio = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
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
