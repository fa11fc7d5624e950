"""Packing of 4-bit activation codes in Triton: equal to reference.py bit for bit.

What      README eq. 1-3, one launch each: every byte is read once and written once.
Contract  codes int8 or e4m3, or packed bytes; any sizes; all is made contiguous. The device must have Triton, or
          Triton's interpreter must be on (TRITON_INTERPRET=1 before Triton is imported).
Tiling    2,048 bytes of packed rows a program. The two planes of a row are two runs of bytes, so that loads and stores
          are 16 bytes a thread where half a row is a multiple of that; nothing moves between threads.
Not here  argument checks and dispatch (op.py).
"""

# Shapes: T = tokens, D = features, B = ceil(D / 2) bytes of a row, BT x BB = tokens and bytes of a tile.

import torch
import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import ROUNDING, float8_bytes, float8_numbers

_TILE = 2048


def pack_codes_triton(codes_TD: torch.Tensor, num_format: str) -> torch.Tensor:
    """README eq. 1: uint8 [..., B]."""
    codes_TD = codes_TD.contiguous()
    num_features = codes_TD.shape[-1]
    packed_TB = torch.empty(*codes_TD.shape[:-1], (num_features + 1) // 2, dtype=torch.uint8, device=codes_TD.device)
    _launch(_pack_kernel, codes_TD, packed_TB, num_features, num_format, codes_TD.dtype)
    return packed_TB


def unpack_codes_triton(
    packed_TB: torch.Tensor, num_features: int, num_format: str, code_dtype: torch.dtype
) -> torch.Tensor:
    """README eq. 2 and 3: codes [..., D]."""
    packed_TB = packed_TB.contiguous()
    codes_TD = torch.empty(*packed_TB.shape[:-1], num_features, dtype=torch.int8, device=packed_TB.device)
    _launch(_unpack_kernel, codes_TD, packed_TB, num_features, num_format, code_dtype)
    return codes_TD.view(code_dtype)


def _launch(kernel, codes_TD, packed_TB, num_features: int, num_format: str, code_dtype: torch.dtype) -> None:
    num_bytes = packed_TB.shape[-1]
    if num_tokens := packed_TB.numel() // num_bytes:
        block_bytes = min(_TILE, triton.next_power_of_2(num_bytes))
        block_tokens = _TILE // block_bytes
        grid = (triton.cdiv(num_tokens, block_tokens), triton.cdiv(num_bytes, block_bytes))
        is_float8 = code_dtype == torch.float8_e4m3fn
        with torch.cuda.device_of(packed_TB):
            kernel[grid](
                codes_TD.view(torch.int8),
                packed_TB.view(torch.int8),
                num_tokens,
                num_features,
                num_format,
                is_float8,
                block_tokens,
                block_bytes,
                num_warps=4,
            )


@triton.jit
def _places(num_tokens, NUM_FEATURES: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_BYTES: tl.constexpr):
    """Of a tile [BT, BB]: offsets of its bytes and of their low codes, and which bytes and which high codes exist."""
    num_bytes: tl.constexpr = (NUM_FEATURES + 1) // 2
    tokens = (tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS))[:, None]
    places = (tl.program_id(1) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES))[None, :]
    mask = (tokens < num_tokens) & (places < num_bytes)
    has_high = (tokens < num_tokens) & (places < NUM_FEATURES - num_bytes)
    return tokens * num_bytes + places, tokens * NUM_FEATURES + places, mask, has_high


@triton.jit
def _fields(codes, FORMAT: tl.constexpr, IS_FLOAT8: tl.constexpr):
    """The 4 bits, as int32, of codes that are int8 or the bytes of e4m3."""
    if IS_FLOAT8:
        # The sum holds the number in its lowest bits.
        integers = (float8_numbers(codes) + ROUNDING).to(tl.int32, bitcast=True) - 0x4B400000
    else:
        integers = codes.to(tl.int32)
    if FORMAT == "int4":
        fields = integers & 15
    else:
        size = tl.abs(integers)
        place = tl.where(size < 4, size, tl.where(size < 8, (size >> 1) + 2, (size >> 2) + 4))
        fields = place | tl.where(integers < 0, 8, 0)
    return fields


@triton.jit
def _codes(fields, FORMAT: tl.constexpr, IS_FLOAT8: tl.constexpr):
    """The inverse of ``_fields``: int8, or the bytes of e4m3."""
    if FORMAT == "int4":
        integers = (fields << 28) >> 28
    else:
        place = fields & 7
        size = tl.where(place < 4, place, (2 + (place & 1)) << tl.maximum((place >> 1) - 1, 0))
        integers = tl.where((fields & 8) != 0, -size, size)
    if IS_FLOAT8:
        return float8_bytes(integers.to(tl.float32))
    else:
        return integers.to(tl.int8)


@triton.jit
def _pack_kernel(
    codes_ptr,
    packed_ptr,
    num_tokens,
    NUM_FEATURES: tl.constexpr,
    FORMAT: tl.constexpr,
    IS_FLOAT8: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    bytes_at, low_at, mask, has_high = _places(num_tokens, NUM_FEATURES, BLOCK_TOKENS, BLOCK_BYTES)
    num_bytes: tl.constexpr = (NUM_FEATURES + 1) // 2
    low = tl.load(codes_ptr + low_at, mask=mask, other=0)
    high = tl.load(codes_ptr + low_at + num_bytes, mask=has_high, other=0)
    fields = _fields(low, FORMAT, IS_FLOAT8) | (_fields(high, FORMAT, IS_FLOAT8) << 4)
    tl.store(packed_ptr + bytes_at, fields.to(tl.int8), mask=mask)


@triton.jit
def _unpack_kernel(
    codes_ptr,
    packed_ptr,
    num_tokens,
    NUM_FEATURES: tl.constexpr,
    FORMAT: tl.constexpr,
    IS_FLOAT8: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    bytes_at, low_at, mask, has_high = _places(num_tokens, NUM_FEATURES, BLOCK_TOKENS, BLOCK_BYTES)
    num_bytes: tl.constexpr = (NUM_FEATURES + 1) // 2
    packed = tl.load(packed_ptr + bytes_at, mask=mask, other=0).to(tl.int32)
    tl.store(codes_ptr + low_at, _codes(packed & 15, FORMAT, IS_FLOAT8), mask=mask)
    tl.store(codes_ptr + low_at + num_bytes, _codes((packed >> 4) & 15, FORMAT, IS_FLOAT8), mask=has_high)
