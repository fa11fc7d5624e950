"""Codes transposed in Triton, as they are or shifted by a power of 2 for each row: 8-bit tensor cores contract what is
contiguous, so the weight gradient needs its operands by column.

What      A tile is read as 32-bit words of four codes, four rows at a time; byte permutations turn four words into four
          words of a column each. Byte by byte a tile takes 5 instructions a code (16 with a shift) instead of 3 (4).
Contract  codes int8, or the bytes of e4m3 ones, [R, D]; columns [D, P] contiguous with P a multiple of 4. To shift,
          codes are integers in e4m3 and shifts powers of 2. Rows from ``end`` to ``padded_end`` become zeros.
Numerics  the bits of reference.py.
Not here  which rows are whose (grouped_ternary_gemm/triton_codes.py).
"""

# Shapes: R = rows, D = features, P = padded rows; Q, W = fours of rows and words of a tile.

import torch
import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import IS_INTERPRETED
from bitmoe_kernels.ternary_gemm.reference import pad_last
from bitmoe_kernels.ternary_gemm.triton_grad import code_shift, shifted_bytes

COLUMN_TILE = {"BLOCK_ROWS": 128, "BLOCK_WORDS": 32, "num_warps": 4}


@triton.jit
def write_columns(
    codes_ptr,
    source_ptr,
    power_ptr,
    largest,
    columns_ptr,
    first,
    end,
    column,
    padded_end,
    num_features,
    num_words,
    num_column_words,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """Write rows ``first`` to ``end`` of this program's words to columns from ``column`` on, up to ``padded_end``.

    Both are multiples of 16. Pointers and ``stride`` count words. ``source_ptr`` says where the codes of each row lie,
    or is None if they lie in order; ``power_ptr`` may be None; ``largest`` is what powers are compared with.
    """
    fours = tl.arange(0, BLOCK_ROWS // 4)
    words = tl.program_id(0) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    tiles = ()
    for i in tl.static_range(4):
        rows = first + 4 * fours + i
        is_row = rows < end
        mask = is_row[:, None] & (words < num_words)[None, :]
        sources = rows
        if source_ptr is not None:
            sources = tl.load(source_ptr + rows, mask=is_row, other=0)
        tile = tl.load(codes_ptr + sources[:, None].to(tl.int64) * stride + words[None, :], mask=mask, other=0)
        if power_ptr is not None:
            tile = _shifted_words(tile, code_shift(power_ptr + rows, largest, is_row), is_row)
        tiles = tiles + (tile,)
    transposed = _transposed_bytes(tiles[0], tiles[1], tiles[2], tiles[3])
    # Said in words, and that four of them are aligned, for stores of 16 bytes.
    offs_p = (tl.multiple_of(column // 4, 4) + fours)[None, :]
    mask_p = offs_p < tl.multiple_of(padded_end // 4, 4)
    for i in tl.static_range(4):
        features = (4 * words + i)[:, None]
        ptrs = columns_ptr + features.to(tl.int64) * num_column_words + offs_p
        mask = (features < num_features) & mask_p
        # What other rows read again (codes of tokens) is not to make room for it in L2.
        tl.store(ptrs, tl.trans(transposed[i]), mask=mask, eviction_policy="evict_first")


@triton.jit
def _transposed_bytes(a, b, c, d):
    """Byte i of four words, in order, is word i of the result."""
    if IS_INTERPRETED:
        columns = ()
        for i in tl.static_range(4):
            low = ((a >> (8 * i)) & 0xFF) | (((b >> (8 * i)) & 0xFF) << 8)
            columns = columns + (low | (((c >> (8 * i)) & 0xFF) << 16) | (((d >> (8 * i)) & 0xFF) << 24),)
        return columns
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 ab, cd, ab_high, cd_high;
            prmt.b32 ab, $4, $5, 0x5140;
            prmt.b32 cd, $6, $7, 0x5140;
            prmt.b32 ab_high, $4, $5, 0x7362;
            prmt.b32 cd_high, $6, $7, 0x7362;
            prmt.b32 $0, ab, cd, 0x5410;
            prmt.b32 $1, ab, cd, 0x7632;
            prmt.b32 $2, ab_high, cd_high, 0x5410;
            prmt.b32 $3, ab_high, cd_high, 0x7632;
            }""",
            "=r,=r,=r,=r,r,r,r,r",
            [a, b, c, d],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _shifted_words(words, shift, is_row):
    """Words [Q, W] of four e4m3 codes each, times ``shift`` [Q]; 0 where there is no row."""
    exponent = (shift.to(tl.int32, bitcast=True) >> 23) - 127
    # Codes that are not zero are 1 or more: down to 2^-6 none becomes a denormal, and its exponent alone changes.
    is_plain = ((exponent >= -6) & (exponent <= 5)) | ~is_row
    if tl.min(is_plain.to(tl.int32), axis=0) > 0:
        is_code = (((words & 0x7F7F7F7F) + 0x7F7F7F7F) >> 7) & 0x01010101
        return words + is_code * (8 * exponent)[:, None]
    result = tl.zeros_like(words)
    for i in tl.static_range(4):
        codes = shifted_bytes((words >> (8 * i)).to(tl.int8), shift[:, None])
        result |= (codes.to(tl.int32) & 0xFF) << (8 * i)
    return result


@triton.jit
def _transpose_codes_kernel(
    codes_ptr,
    power_ptr,
    largest_ptr,
    columns_ptr,
    num_rows,
    num_features,
    num_words,
    num_column_words,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    first = tl.program_id(1) * BLOCK_ROWS
    largest = None
    if power_ptr is not None:
        largest = tl.load(largest_ptr)
    write_columns(
        codes_ptr,
        None,
        power_ptr,
        largest,
        columns_ptr,
        first,
        num_rows,
        first,
        4 * num_column_words,
        num_features,
        num_words,
        num_column_words,
        stride,
        BLOCK_ROWS,
        BLOCK_WORDS,
    )


def transpose_codes(
    codes_RD: torch.Tensor,
    columns_DP: torch.Tensor,
    power_R1: torch.Tensor | None = None,
    largest_1: torch.Tensor | None = None,
) -> None:
    """Write int8 codes, or the bytes of e4m3 ones, [R, D] transposed and padded with zeros.

    With powers, codes are shifted: README eq. 5.
    """
    num_rows, num_features = codes_RD.shape
    num_columns = columns_DP.shape[1]
    grid = (
        triton.cdiv(num_features, 4 * COLUMN_TILE["BLOCK_WORDS"]),
        triton.cdiv(num_columns, COLUMN_TILE["BLOCK_ROWS"]),
    )
    if not grid[0] * grid[1]:
        return
    words_RW = words_of(codes_RD)
    with torch.cuda.device_of(codes_RD):
        _transpose_codes_kernel[grid](
            words_RW,
            power_R1,
            largest_1,
            columns_DP.view(torch.int32),
            num_rows,
            num_features,
            words_RW.shape[1],
            num_columns // 4,
            words_RW.stride(0),
            **COLUMN_TILE,
        )


def words_of(codes_RD: torch.Tensor) -> torch.Tensor:
    """Codes as int32 [R, D / 4]; copied where rows do not begin at words, with zeros to a whole word."""
    codes_RD = codes_RD.view(torch.int8)
    num_features = codes_RD.shape[1]
    is_aligned = num_features % 4 == codes_RD.stride(0) % 4 == codes_RD.storage_offset() % 4 == 0
    if not is_aligned or codes_RD.stride(1) != 1:
        codes_RD = pad_last(codes_RD, -(-num_features // 4) * 4).contiguous()
    return codes_RD.view(torch.int32)
