"""Triton kernel that transposes codes expert by expert, as they are or shifted by a power of 2 for each row.

What      The tiles of ``ternary_gemm/triton_columns.py``; along rows they come from triton_row_tiles.py, so that no
          tile holds rows of two experts. Each expert's rows start at a multiple of PADDING in the transposed codes.
Contract  as there. Rows past ``ends_E[-1]`` are not read; the padding of an expert is written as zeros, what follows
          the last expert's is not written.
Numerics  the bits of reference.py.
Not here  dY (ternary_gemm/triton_grad.py).
"""

import torch
import triton
import triton.language as tl

from bitmoe_kernels.grouped_ternary_gemm.triton_row_tiles import RowTiles
from bitmoe_kernels.ternary_gemm.reference import CHUNK
from bitmoe_kernels.ternary_gemm.triton_columns import COLUMN_TILE, words_of, write_columns

# Shapes: R = rows sorted by expert, E = experts, D = features, P = padded rows.

CHUNK_TILE = {"BLOCK_ROWS": CHUNK, "BLOCK_WORDS": 32, "num_warps": 8}
"""For columns that are contracted by chunks."""


@triton.jit
def _grouped_transpose_codes_kernel(
    codes_ptr,
    source_ptr,
    power_ptr,
    largest_ptr,
    columns_ptr,
    table_ptr,
    count_ptr,
    padded_ends_ptr,
    max_tiles,
    num_features,
    num_words,
    num_column_words,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    slot = tl.program_id(1)
    if slot >= tl.load(count_ptr):
        return
    expert = tl.load(table_ptr + slot)
    largest = None
    if power_ptr is not None:
        largest = tl.load(largest_ptr + expert)
    write_columns(
        codes_ptr,
        source_ptr,
        power_ptr,
        largest,
        columns_ptr,
        tl.load(table_ptr + max_tiles + slot),
        tl.load(table_ptr + 2 * max_tiles + slot),
        tl.load(table_ptr + 3 * max_tiles + slot),
        tl.load(padded_ends_ptr + expert),
        num_features,
        num_words,
        num_column_words,
        stride,
        BLOCK_ROWS,
        BLOCK_WORDS,
    )


def grouped_transpose_codes(
    codes_RD: torch.Tensor,
    tiles: RowTiles,
    columns_DP: torch.Tensor,
    power_R1: torch.Tensor | None = None,
    largest_E: torch.Tensor | None = None,
    source_R: torch.Tensor | None = None,
    tile: dict = COLUMN_TILE,
) -> None:
    """Write int8 codes, or the bytes of e4m3 ones, transposed, each expert's rows at its padded start.

    ``tiles`` are of the rows of ``tile`` and cover the padding. With powers, codes are integers in e4m3 and are
    shifted. With ``source_R`` (int32) row r's codes are those at ``source_R[r]``.
    """
    num_features, num_columns = columns_DP.shape
    if not num_features:
        return
    words_RW, max_tiles = words_of(codes_RD), tiles.table_4S.shape[1]
    _grouped_transpose_codes_kernel[(triton.cdiv(num_features, 4 * tile["BLOCK_WORDS"]), max_tiles)](
        words_RW,
        source_R,
        power_R1,
        largest_E,
        columns_DP.view(torch.int32),
        *tiles,
        max_tiles,
        num_features,
        words_RW.shape[1],
        num_columns // 4,
        words_RW.stride(0),
        **tile,
    )
