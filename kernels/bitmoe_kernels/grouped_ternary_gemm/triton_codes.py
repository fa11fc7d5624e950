"""Triton kernels that write codes with the contracted dimension contiguous, expert by expert, and round dY.

What      Tiles of 128 x 128 as in the dense ``ternary_gemm``; along rows they come from triton_row_tiles.py, so that no
          tile holds rows of two experts. Each expert's rows start at a multiple of PADDING in the transposed codes.
Contract  codes int8 (or e4m3 where named), scales fp32, last dimension contiguous; outputs are allocated by the caller.
          Rows past ``ends_E[-1]`` are not read; the padding of an expert is written as zeros, what follows the last
          expert's is not written.
Numerics  the bits of reference.py.
"""

import torch
import triton
import triton.language as tl

from bitmoe_kernels.grouped_ternary_gemm.reference import PADDING
from bitmoe_kernels.grouped_ternary_gemm.triton_row_tiles import RowTiles, row_tiles
from bitmoe_kernels.ternary_gemm.triton_kernels import COPY_TILE, _as_bytes, _codes, _finite_or_inf, _scale

# Shapes: R = rows sorted by expert, E = experts, I = inputs, O = outputs, G = groups of inputs, P = padded rows,
#         C = slots of column scales.


@triton.jit
def _store_columns(columns_ptr, columns, first, offs_c, offs_p, stride, num_features, end):
    """Write a tile of transposed codes, its features from ``first`` on, up to ``num_features`` and the row ``end``."""
    ptrs = columns_ptr + (first + offs_c)[:, None].to(tl.int64) * stride + offs_p[None, :]
    tl.store(ptrs, columns, mask=(offs_c < num_features)[:, None] & (offs_p < end)[None, :])


@triton.jit
def _grouped_columns_kernel(
    codes_ptr,
    columns_ptr,
    table_ptr,
    count_ptr,
    padded_ends_ptr,
    max_tiles,
    num_inputs,
    num_columns,
    stride,
    TO_FLOAT8: tl.constexpr,
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
    columns = tl.trans(_as_bytes(codes, TO_FLOAT8))
    column_end = tl.multiple_of(tl.load(padded_ends_ptr + expert), PADDING)
    _store_columns(columns_ptr, columns, 0, offs_c, offs_p, num_columns, num_inputs, column_end)


def grouped_k_major_codes(codes_RI: torch.Tensor, ends_E: torch.Tensor, columns_IP: torch.Tensor) -> None:
    """Write codes transposed, each expert's rows at its padded start, in the type of the output."""
    num_inputs, num_columns = columns_IP.shape
    if not num_inputs:
        return
    tiles = row_tiles(ends_E, num_columns, COPY_TILE, cover_padding=True)
    max_tiles = tiles.table_4S.shape[1]
    _grouped_columns_kernel[(triton.cdiv(num_inputs, COPY_TILE), max_tiles)](
        codes_RI.view(torch.int8),
        columns_IP.view(torch.int8),
        *tiles,
        max_tiles,
        num_inputs,
        num_columns,
        codes_RI.stride(0),
        TO_FLOAT8=columns_IP.dtype != codes_RI.dtype,
        PADDING=PADDING,
        BLOCK=COPY_TILE,
        num_warps=8,
    )


@triton.jit
def _batched_k_major_codes_kernel(
    codes_ptr,
    rows_ptr,
    columns_ptr,
    num_rows,
    num_features,
    padded_rows,
    WRITE_ROWS: tl.constexpr,
    TO_FLOAT8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs_r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offs_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(2).to(tl.int64)
    mask = (offs_r < num_rows)[:, None] & (offs_c < num_features)[None, :]
    offsets = (batch * num_rows + offs_r)[:, None] * num_features + offs_c[None, :]
    codes = _as_bytes(tl.load(codes_ptr + offsets, mask=mask, other=0), TO_FLOAT8)
    if WRITE_ROWS:
        tl.store(rows_ptr + offsets, codes, mask=mask)
    columns = tl.trans(codes)
    _store_columns(columns_ptr, columns, batch * num_features, offs_c, offs_r, padded_rows, num_features, padded_rows)


def batched_k_major_codes(codes_EOI: torch.Tensor, rows_EOI: torch.Tensor | None, columns_EIP: torch.Tensor) -> None:
    """Write contiguous codes as e4m3, row by row (where wanted) and transposed with zeros as padding."""
    num_experts, num_features, padded_rows = columns_EIP.shape
    grid = (triton.cdiv(num_features, COPY_TILE), triton.cdiv(padded_rows, COPY_TILE), num_experts)
    if not columns_EIP.numel():
        return
    _batched_k_major_codes_kernel[grid](
        codes_EOI.view(torch.int8),
        None if rows_EOI is None else rows_EOI.view(torch.int8),
        columns_EIP.view(torch.int8),
        codes_EOI.shape[1],
        num_features,
        padded_rows,
        WRITE_ROWS=rows_EOI is not None,
        TO_FLOAT8=codes_EOI.dtype == torch.int8,
        BLOCK=COPY_TILE,
        num_warps=8,
    )


@triton.jit
def _column_slot(table_ptr, padded_ends_ptr, slot, expert, max_tiles, block_rows):
    """Where the tile's column scales lie, and whether the tile is the first of its block of rows."""
    start = tl.load(padded_ends_ptr + expert - 1, mask=expert > 0, other=0)
    offset = tl.load(table_ptr + 3 * max_tiles + slot) - start
    return start // block_rows + expert + offset // block_rows, offset % block_rows == 0


@triton.jit
def _load_dy(dy_ptr, offs_r, offs_o, mask_r, mask_o, stride):
    """A tile [R, O] of dY in fp32."""
    ptrs = dy_ptr + offs_r[:, None].to(tl.int64) * stride + offs_o[None, :]
    return tl.load(ptrs, mask=mask_r[:, None] & mask_o[None, :], other=0.0).to(tl.float32)


@triton.jit
def _grouped_absmax_kernel(
    dy_ptr,
    x_scale_ptr,
    w_scale_ptr,
    row_absmax_ptr,
    column_absmax_ptr,
    table_ptr,
    count_ptr,
    padded_ends_ptr,
    max_tiles,
    num_outputs,
    num_slots,
    stride,
    block_rows,
    GROUPS: tl.constexpr,
    HAS_W_SCALE: tl.constexpr,
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
    dy = _load_dy(dy_ptr, offs_r, offs_o, mask_r, mask_o, stride)
    rows = dy
    if HAS_W_SCALE:
        w_scale_ptrs = w_scale_ptr + expert.to(tl.int64) * num_outputs + offs_o
        rows = dy * tl.load(w_scale_ptrs, mask=mask_o, other=0.0)[None, :]
    tl.atomic_max(row_absmax_ptr + offs_r, tl.max(_finite_or_inf(rows), axis=1), mask=mask_r, sem="relaxed")
    column_slot, _ = _column_slot(table_ptr, padded_ends_ptr, slot, expert, max_tiles, block_rows)
    for group in tl.static_range(GROUPS):
        columns = dy * tl.load(x_scale_ptr + offs_r * GROUPS + group, mask=mask_r, other=0.0)[:, None]
        column_ptrs = column_absmax_ptr + (group * num_slots + column_slot) * num_outputs + offs_o
        tl.atomic_max(column_ptrs, tl.max(_finite_or_inf(columns), axis=0), mask=mask_o, sem="relaxed")


@triton.jit
def _grouped_quantize_grad_kernel(
    dy_ptr,
    x_scale_ptr,
    w_scale_ptr,
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
    num_slots,
    stride,
    block_rows,
    num_columns,
    min_absmax,
    GROUPS: tl.constexpr,
    HAS_W_SCALE: tl.constexpr,
    ROW_LEVELS: tl.constexpr,
    COLUMN_LEVELS: tl.constexpr,
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
    dy = _load_dy(dy_ptr, offs_r, offs_o, mask_r, mask_o, stride)
    rows = dy
    if HAS_W_SCALE:
        w_scale_ptrs = w_scale_ptr + expert.to(tl.int64) * num_outputs + offs_o
        rows = dy * tl.load(w_scale_ptrs, mask=mask_o, other=0.0)[None, :]
    row_absmax = tl.maximum(tl.load(row_absmax_ptr + offs_r, mask=mask_r, other=0.0), min_absmax)
    row_codes = _codes(rows, row_absmax[:, None], ROW_LEVELS, rows_ptr.dtype.element_ty)
    row_ptrs = rows_ptr + offs_r[:, None].to(tl.int64) * num_outputs + offs_o[None, :]
    tl.store(row_ptrs, row_codes, mask=mask_r[:, None] & mask_o[None, :])
    if pid_o == 0:
        tl.store(row_scale_ptr + offs_r, _scale(row_absmax, ROW_LEVELS), mask=mask_r)
    column_slot, is_first = _column_slot(table_ptr, padded_ends_ptr, slot, expert, max_tiles, block_rows)
    column_end = tl.multiple_of(tl.load(padded_ends_ptr + expert), PADDING)
    for group in tl.static_range(GROUPS):
        columns = dy * tl.load(x_scale_ptr + offs_r * GROUPS + group, mask=mask_r, other=0.0)[:, None]
        offs_scale = (group * num_slots + column_slot) * num_outputs + offs_o
        absmax = tl.maximum(tl.load(column_absmax_ptr + offs_scale, mask=mask_o, other=0.0), min_absmax)
        codes = tl.trans(_codes(columns, absmax[None, :], COLUMN_LEVELS, columns_ptr.dtype.element_ty))
        _store_columns(columns_ptr, codes, group * num_outputs, offs_o, offs_p, num_columns, num_outputs, column_end)
        if is_first:
            tl.store(column_scale_ptr + offs_scale, _scale(absmax, COLUMN_LEVELS), mask=mask_o)


def grouped_quantize_grad(
    dy_RO: torch.Tensor,
    x_scale_RG: torch.Tensor,
    w_scale_EO: torch.Tensor | None,
    ends_E: torch.Tensor,
    block_rows: int,
    min_absmax: float,
    levels: tuple[float, float],
    rows_RO: torch.Tensor,
    row_scale_R1: torch.Tensor,
    columns_GOP: torch.Tensor,
    column_scale_GCO: torch.Tensor,
) -> RowTiles:
    """Read dY twice (largest magnitudes, then codes) and write its codes by row and by column, with their scales.

    ``block_rows`` is a multiple of the tile, or more than P. Returns the tiles, for the padded ends of the columns.
    """
    num_rows, num_outputs = dy_RO.shape
    num_groups, num_slots, _ = column_scale_GCO.shape
    num_columns = columns_GOP.shape[2]
    tiles = row_tiles(ends_E, num_columns, COPY_TILE, cover_padding=True)
    max_tiles = tiles.table_4S.shape[1]
    absmax = dy_RO.new_zeros(num_rows + column_scale_GCO.numel(), dtype=torch.float32)
    inputs = (dy_RO, x_scale_RG.contiguous(), w_scale_EO, absmax[:num_rows], absmax[num_rows:])
    sizes = (*tiles, max_tiles, num_outputs, num_slots, dy_RO.stride(0), block_rows)
    shape = {"GROUPS": num_groups, "HAS_W_SCALE": w_scale_EO is not None, "BLOCK": COPY_TILE, "num_warps": 8}
    grid = (triton.cdiv(num_outputs, COPY_TILE), max_tiles)
    _grouped_absmax_kernel[grid](*inputs, *sizes, **shape)
    _grouped_quantize_grad_kernel[grid](
        *inputs,
        rows_RO,
        row_scale_R1,
        columns_GOP,
        column_scale_GCO,
        *sizes,
        num_columns,
        min_absmax,
        ROW_LEVELS=levels[0],
        COLUMN_LEVELS=levels[1],
        PADDING=PADDING,
        enable_fp_fusion=False,
        **shape,
    )
    return tiles
