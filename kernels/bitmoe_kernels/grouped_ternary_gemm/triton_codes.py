"""Triton kernel that transposes codes expert by expert, as they are or shifted by a power of 2 for each row.

What      Tiles of 128 x 128 as in the dense ``ternary_gemm``; along rows they come from triton_row_tiles.py, so that no
          tile holds rows of two experts. Each expert's rows start at a multiple of PADDING in the transposed codes.
Contract  codes int8, or the bytes of e4m3 ones, last dimension contiguous; outputs are allocated by the caller. Rows
          past ``ends_E[-1]`` are not read; the padding of an expert is written as zeros, what follows the last
          expert's is not written.
Numerics  the bits of reference.py.
Not here  dY (ternary_gemm/triton_grad.py).
"""

import torch
import triton
import triton.language as tl

from bitmoe_kernels.grouped_ternary_gemm.reference import PADDING
from bitmoe_kernels.grouped_ternary_gemm.triton_row_tiles import RowTiles
from bitmoe_kernels.ternary_gemm.triton_grad import code_shift, shifted_bytes
from bitmoe_kernels.ternary_gemm.triton_kernels import COPY_TILE

# Shapes: R = rows sorted by expert, E = experts, D = features, P = padded rows.


@triton.jit
def _grouped_transpose_codes_kernel(
    codes_ptr,
    power_ptr,
    largest_ptr,
    columns_ptr,
    table_ptr,
    count_ptr,
    padded_ends_ptr,
    max_tiles,
    num_features,
    num_columns,
    stride,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(1)
    if slot >= tl.load(count_ptr):
        return
    expert = tl.load(table_ptr + slot)
    offs_r = tl.load(table_ptr + max_tiles + slot) + tl.arange(0, BLOCK)
    mask_r = offs_r < tl.load(table_ptr + 2 * max_tiles + slot)
    offs_p = tl.multiple_of(tl.load(table_ptr + 3 * max_tiles + slot), PADDING) + tl.arange(0, BLOCK)
    offs_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_d = offs_d < num_features
    ptrs = codes_ptr + offs_r[:, None].to(tl.int64) * stride + offs_d[None, :]
    codes = tl.load(ptrs, mask=mask_r[:, None] & mask_d[None, :], other=0)
    if power_ptr is not None:
        codes = shifted_bytes(codes, code_shift(power_ptr + offs_r, tl.load(largest_ptr + expert), mask_r)[:, None])
    column_ptrs = columns_ptr + offs_d[:, None].to(tl.int64) * num_columns + offs_p[None, :]
    column_end = tl.multiple_of(tl.load(padded_ends_ptr + expert), PADDING)
    tl.store(column_ptrs, tl.trans(codes), mask=mask_d[:, None] & (offs_p < column_end)[None, :])


def grouped_transpose_codes(
    codes_RD: torch.Tensor,
    tiles: RowTiles,
    columns_DP: torch.Tensor,
    power_R1: torch.Tensor | None = None,
    largest_E: torch.Tensor | None = None,
) -> None:
    """Write int8 codes, or the bytes of e4m3 ones, transposed, each expert's rows at its padded start.

    ``tiles`` are of COPY_TILE rows and cover the padding. With powers, codes are integers in e4m3 and are shifted.
    """
    num_features, num_columns = columns_DP.shape
    if not num_features:
        return
    max_tiles = tiles.table_4S.shape[1]
    _grouped_transpose_codes_kernel[(triton.cdiv(num_features, COPY_TILE), max_tiles)](
        codes_RD,
        power_R1,
        largest_E,
        columns_DP,
        *tiles,
        max_tiles,
        num_features,
        num_columns,
        codes_RD.stride(0),
        PADDING=PADDING,
        BLOCK=COPY_TILE,
        num_warps=8,
    )
