"""Ternary codes of two neighbouring weights at a time, as the halves of a 32-bit word.

What      Comparison of 16-bit weights with their limits, and the bytes that products take. With all that is loaded and
          stored 8.6 instructions a weight (10.1 for int8 rows), where codes made one by one take 12.4 (13.1; sm_90).
Numerics  W / scale rounded half to even is above 1/2 exactly where |W| > scale / 2: rounding the quotient cannot cross
          from above 1/2 to 1/2, for |W| is then at least the next float after scale / 2. So no division. Floats are
          ordered as their bits are: |W| > scale / 2 where its bits are at least those of the smallest number of its
          type above scale / 2, the limit.
Not here  where weights lie and codes go (triton_operands.py).
"""

# Shapes: R = rows, K = pairs of columns. Words hold the left column in their lower half.

import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import IS_INTERPRETED, to_float32

_SIGNS = tl.constexpr(0x80008000)


@triton.jit
def limit_bits(half_scale, dtype: tl.constexpr):
    """Bits, uint32, of the smallest number of a 16-bit ``dtype`` above fp32 ``half_scale``; NaN's if there is none."""
    # NaN may have a sign.
    half_scale = tl.abs(half_scale)
    if dtype == tl.bfloat16:
        return (half_scale.to(tl.uint32, bitcast=True) >> 16) + 1
    else:
        rounded = half_scale.to(tl.float16)
        return rounded.to(tl.uint16, bitcast=True).to(tl.uint32) + (rounded.to(tl.float32) <= half_scale).to(tl.uint32)


@triton.jit
def signs_of_pairs(words, limits, dtype: tl.constexpr):
    """Which halves have a code that is not 0, and which a negative one, each as the sign bit of the half.

    Args:
        words: weights of a 16-bit ``dtype``, uint32.
        limits: words of :func:`limit_bits`.
        dtype: of the weights.
    """
    SMALLEST_NAN: tl.constexpr = 0x7F81 if dtype == tl.bfloat16 else 0x7C01
    magnitudes = words | _SIGNS
    # A difference keeps the sign bit where the magnitude is not the smaller one.
    nonzero = (magnitudes - limits) & ((magnitudes - SMALLEST_NAN * 0x10001) ^ _SIGNS) & _SIGNS
    return nonzero, words & nonzero


@triton.jit
def signs_of_weights(w, half_scale):
    """The same of weights of any type, each in the lower half of a word of its own."""
    w = to_float32(w)
    nonzero = tl.where(tl.abs(w) > half_scale, 0x8000, 0).to(tl.uint32)
    return nonzero, (w.to(tl.uint32, bitcast=True) >> 16) & nonzero


@triton.jit
def float8_codes(nonzero, negative):
    """e4m3 codes in the higher byte of each half: 1.0 is 0x38."""
    return (nonzero >> 4) * 7 + negative


@triton.jit
def int8_codes(nonzero, negative):
    """int8 codes in the higher byte of each half: -1 is 1 + 0xFE."""
    return (nonzero >> 7) + (negative >> 7) * 0xFE


@triton.jit
def float8_of_int8(words):
    """The words of :func:`float8_codes` from those of :func:`int8_codes`."""
    return float8_codes((words & 0x01000100) << 7, words & _SIGNS)


@triton.jit
def paired(halves):
    """Words [R, K] of the lower halves of words [R, 2 K]."""
    left, right = tl.split(tl.reshape(halves, [halves.shape[0], halves.shape[1] // 2, 2]))
    return left | (right << 16)


@triton.jit
def bytes_of_pairs(words):
    """The higher bytes of the halves of ``words``, int16."""
    if IS_INTERPRETED:
        return (((words >> 8) & 0xFF) | ((words >> 16) & 0xFF00)).to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7531;", "=r,r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )


@triton.jit
def pairs_of_bytes(pairs):
    """The inverse of :func:`bytes_of_pairs`: the lower bytes are 0."""
    pairs = pairs.to(tl.uint16, bitcast=True).to(tl.uint32)
    return ((pairs << 8) & 0xFF00) | ((pairs << 16) & 0xFF000000)


@triton.jit
def columns_of_four_rows(words_0, words_1, words_2, words_3):
    """The higher bytes of the halves of four rows: words of four bytes for the left and for the right columns."""
    top, bottom = _chosen_bytes(words_0, words_1, 0x7351), _chosen_bytes(words_2, words_3, 0x7351)
    return _chosen_bytes(top, bottom, 0x5410), _chosen_bytes(top, bottom, 0x7632)


@triton.jit
def _chosen_bytes(a, b, CHOICE: tl.constexpr):
    """Words of four bytes of uint32 ``a`` (0 to 3) and ``b`` (4 to 7), the lowest first in the digits of ``CHOICE``."""
    if IS_INTERPRETED:
        chosen = tl.zeros_like(a)
        for place in tl.static_range(4):
            byte = (CHOICE >> (4 * place)) & 7
            chosen |= (((b if byte > 3 else a) >> (8 * (byte & 3))) & 0xFF) << (8 * place)
        return chosen
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, CHOICE], dtype=tl.uint32, is_pure=True, pack=1
        )
