"""Triton kernels that transpose codes and round dY by row and by column, expert by expert.

What      Tiles of 128 x 128 as in the dense ``ternary_gemm``; along rows they come from triton_row_tiles.py, so that no
          tile holds rows of two experts. Each expert's rows start at a multiple of PADDING in the transposed codes.
Contract  scales fp32, last dimension contiguous; outputs are allocated by the caller. Rows past ``ends_E[-1]`` are not
          read; the padding of an expert is written as zeros, what follows the last expert's is not written.
Numerics  the bits of reference.py.
Not here  dY by row alone (ternary_gemm/triton_grad.py).
"""

import torch
import triton
import triton.language as tl

from bitmoe_kernels.grouped_ternary_gemm.reference import PADDING
from bitmoe_kernels.grouped_ternary_gemm.triton_row_tiles import RowTiles, row_tiles
from bitmoe_kernels.ternary_gemm.triton_grad import e4m3_scale, largest_magnitude, load_tile, tile_codes
from bitmoe_kernels.ternary_gemm.triton_kernels import COPY_TILE

# Shapes: R = rows sorted by expert, E = experts, I = inputs, O = outputs, P = padded rows.


@triton.jit
def _store_columns(columns_ptr, columns, offs_c, offs_p, stride, num_features, end):
    """Write a tile of transposed codes up to ``num_features`` and the row ``end``."""
    ptrs = columns_ptr + offs_c[:, None].to(tl.int64) * stride + offs_p[None, :]
    tl.store(ptrs, columns, mask=(offs_c < num_features)[:, None] & (offs_p < end)[None, :])


@triton.jit
def _grouped_transpose_codes_kernel(
    codes_ptr,
    columns_ptr,
    table_ptr,
    count_ptr,
    padded_ends_ptr,
    max_tiles,
    num_inputs,
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
    offs_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = mask_r[:, None] & (offs_c < num_inputs)[None, :]
    codes = tl.load(codes_ptr + offs_r[:, None].to(tl.int64) * stride + offs_c[None, :], mask=mask, other=0)
    column_end = tl.multiple_of(tl.load(padded_ends_ptr + expert), PADDING)
    _store_columns(columns_ptr, tl.trans(codes), offs_c, offs_p, num_columns, num_inputs, column_end)


def grouped_transpose_codes(codes_RI: torch.Tensor, ends_E: torch.Tensor, columns_IP: torch.Tensor) -> None:
    """Write int8 codes, or the bytes of e4m3 ones, transposed, each expert's rows at its padded start."""
    num_inputs, num_columns = columns_IP.shape
    if not num_inputs:
        return
    tiles = row_tiles(ends_E, num_columns, COPY_TILE, cover_padding=True)
    max_tiles = tiles.table_4S.shape[1]
    _grouped_transpose_codes_kernel[(triton.cdiv(num_inputs, COPY_TILE), max_tiles)](
        codes_RI,
        columns_IP,
        *tiles,
        max_tiles,
        num_inputs,
        num_columns,
        codes_RI.stride(0),
        PADDING=PADDING,
        BLOCK=COPY_TILE,
        num_warps=8,
    )


@triton.jit
def _grouped_absmax_kernel(
    dy_ptr,
    w_scale_ptr,
    x_scale_ptr,
    row_absmax_ptr,
    column_absmax_ptr,
    table_ptr,
    count_ptr,
    padded_ends_ptr,
    max_tiles,
    num_outputs,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(1)
    if slot >= tl.load(count_ptr):
        return
    expert = tl.load(table_ptr + slot)
    offs_r = tl.load(table_ptr + max_tiles + slot) + tl.arange(0, BLOCK)
    offs_o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_r = offs_r < tl.load(table_ptr + 2 * max_tiles + slot)
    mask_o = offs_o < num_outputs
    dy = load_tile(dy_ptr, offs_r, offs_o, mask_r, mask_o, num_outputs)
    rows = dy
    if w_scale_ptr is not None:
        rows = dy * tl.load(w_scale_ptr + expert * num_outputs + offs_o, mask=mask_o, other=0.0)[None, :]
    tl.atomic_max(row_absmax_ptr + offs_r, largest_magnitude(rows, 1), mask=mask_r, sem="relaxed")
    columns = dy * tl.load(x_scale_ptr + offs_r, mask=mask_r, other=0.0)[:, None]
    column_ptrs = column_absmax_ptr + expert * num_outputs + offs_o
    tl.atomic_max(column_ptrs, largest_magnitude(columns, 0), mask=mask_o, sem="relaxed")


@triton.jit
def _grouped_quantize_grad_kernel(
    dy_ptr,
    w_scale_ptr,
    x_scale_ptr,
    row_absmax_ptr,
    column_absmax_ptr,
    rows_ptr,
    row_scale_ptr,
    columns_ptr,
    column_scale_ptr,
    table_ptr,
    count_ptr,
    padded_ends_ptr,
    max_tiles,
    num_outputs,
    num_columns,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(1)
    pid_o = tl.program_id(0)
    if slot >= tl.load(count_ptr):
        return
    expert = tl.load(table_ptr + slot)
    offs_r = tl.load(table_ptr + max_tiles + slot) + tl.arange(0, BLOCK)
    offs_p = tl.multiple_of(tl.load(table_ptr + 3 * max_tiles + slot), PADDING) + tl.arange(0, BLOCK)
    offs_o = pid_o * BLOCK + tl.arange(0, BLOCK)
    mask_r = offs_r < tl.load(table_ptr + 2 * max_tiles + slot)
    mask_o = offs_o < num_outputs
    dy = load_tile(dy_ptr, offs_r, offs_o, mask_r, mask_o, num_outputs)
    rows = dy
    if w_scale_ptr is not None:
        rows = dy * tl.load(w_scale_ptr + expert * num_outputs + offs_o, mask=mask_o, other=0.0)[None, :]
    scale, reciprocal = e4m3_scale(tl.load(row_absmax_ptr + offs_r, mask=mask_r, other=0.0))
    row_ptrs = rows_ptr + offs_r[:, None].to(tl.int64) * num_outputs + offs_o[None, :]
    tl.store(row_ptrs, tile_codes(rows, reciprocal[:, None]), mask=mask_r[:, None] & mask_o[None, :])
    if pid_o == 0:
        tl.store(row_scale_ptr + offs_r, scale, mask=mask_r)
    columns = dy * tl.load(x_scale_ptr + offs_r, mask=mask_r, other=0.0)[:, None]
    offs_scale = expert * num_outputs + offs_o
    scale, reciprocal = e4m3_scale(tl.load(column_absmax_ptr + offs_scale, mask=mask_o, other=0.0))
    codes = tl.trans(tile_codes(columns, reciprocal[None, :]))
    column_end = tl.multiple_of(tl.load(padded_ends_ptr + expert), PADDING)
    _store_columns(columns_ptr, codes, offs_o, offs_p, num_columns, num_outputs, column_end)
    is_experts_first = tl.load(table_ptr + slot - 1, mask=slot > 0, other=-1) != expert
    if is_experts_first:
        tl.store(column_scale_ptr + offs_scale, scale, mask=mask_o)


def grouped_quantize_rows_and_columns(
    dy_RO: torch.Tensor,
    w_scale_EO: torch.Tensor | None,
    x_scale_R1: torch.Tensor,
    ends_E: torch.Tensor,
    rows_RO: torch.Tensor,
    row_scale_R1: torch.Tensor,
    columns_OP: torch.Tensor,
    column_scale_EO: torch.Tensor,
) -> RowTiles:
    """Read dY twice (largest magnitudes, then codes) and write its codes by row and by column, with their scales.

    Returns the tiles, for the padded ends of the columns.
    """
    num_rows, num_outputs = dy_RO.shape
    num_columns = columns_OP.shape[1]
    tiles = row_tiles(ends_E, num_columns, COPY_TILE, cover_padding=True)
    max_tiles = tiles.table_4S.shape[1]
    absmax = dy_RO.new_zeros(num_rows + column_scale_EO.numel(), dtype=torch.float32)
    inputs = (dy_RO, w_scale_EO, x_scale_R1, absmax[:num_rows], absmax[num_rows:])
    sizes = (*tiles, max_tiles, num_outputs)
    grid = (triton.cdiv(num_outputs, COPY_TILE), max_tiles)
    _grouped_absmax_kernel[grid](*inputs, *sizes, BLOCK=COPY_TILE, num_warps=8)
    _grouped_quantize_grad_kernel[grid](
        *inputs,
        rows_RO.view(torch.int8),
        row_scale_R1,
        columns_OP.view(torch.int8),
        column_scale_EO,
        *sizes,
        num_columns,
        PADDING=PADDING,
        BLOCK=COPY_TILE,
        num_warps=8,
    )
    return tiles
