"""Ternary codes of weights in Triton, in the layouts of 8-bit products: bit for bit those of reference.py.

What      One read of W and of the former codes, one write of codes in each layout, and counts.
Contract  bf16, fp16 or fp32 weights; any sizes; W is made contiguous. Former codes may be overwritten in place.
Numerics  fp32 W / scale rounded half to even is above 1/2 exactly where |W| > scale / 2: rounding the quotient
          cannot cross from above 1/2 to 1/2, for |W| is then at least the next float after scale / 2. So no division.
Tiling    Four rows of codes make words of four bytes along the outputs, which are transposed as a whole: a quarter of
          the traffic through shared memory that single bytes would take.
Not here  scales (triton_absmean.py), fp64 weights, argument checks and dispatch (op.py).
"""

# Shapes: O = output rows, P = O padded with zeros to a multiple of 16, I = input columns, G = quantization groups,
#         N = programs; "..." = any batch, such as experts.

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from bitmoe_kernels.ternary_gemm.reference import padded_length

OPERANDS_TILE = {"BLOCK_O": 64, "BLOCK_I": 128, "num_warps": 4}
# A changed code counts this much in a sum where one other than zero counts 1: more than a tile has codes.
_CHANGED = tl.constexpr(1 << 16)


class OperandMemory(NamedTuple):
    """Where codes go, and what the kernel must know of it."""

    former_rows: torch.Tensor | None
    """To compare with, if changes are counted; may be the same memory as the new ones."""
    rows: torch.Tensor
    columns: torch.Tensor | None
    counts_3N: torch.Tensor | None
    """int32: zeros, changed codes and all codes of each tile, if they are counted."""

    def arguments(self) -> tuple[torch.Tensor | None, ...]:
        """As the kernel takes them: columns in words of four codes."""
        former_rows = None if self.former_rows is None else self.former_rows.view(torch.int8)
        columns = None if self.columns is None else self.columns.view(torch.int32)
        return former_rows, self.rows.view(torch.int8), columns, self.counts_3N

    def constants(self) -> dict[str, bool]:
        """Constants of the compiled kernel."""
        return {
            "ROWS_ARE_FLOAT8": self.rows.dtype == torch.float8_e4m3fn,
            "HAS_FORMER": self.former_rows is not None,
            "FORMER_IS_FLOAT8": self.former_rows is not None and self.former_rows.dtype == torch.float8_e4m3fn,
            "WITH_COLUMNS": self.columns is not None,
        }

    def result(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Codes, transposed codes, and counts int64 [3]."""
        return self.rows, self.columns, None if self.counts_3N is None else self.counts_3N.sum(dim=1)


def operand_memory(
    w_OI: torch.Tensor,
    row_dtype: torch.dtype,
    with_columns: bool,
    former: tuple[torch.Tensor, torch.Tensor | None] | None,
    is_counted: bool,
    tile: dict,
) -> OperandMemory:
    """Room for the codes of ``w_OI``: that of the ``former`` rows and columns where type and layout are the same."""
    former_rows_OI, columns_IP = (None, None) if former is None else former
    rows_OI = former_rows_OI
    if rows_OI is None or rows_OI.dtype != row_dtype:
        rows_OI = torch.empty_like(w_OI, dtype=torch.int8).view(row_dtype)
    batch, (num_rows, num_columns) = w_OI.shape[:-2], w_OI.shape[-2:]
    if not with_columns:
        columns_IP = None
    elif columns_IP is None:
        shape = (*batch, num_columns, padded_length(num_rows))
        columns_IP = torch.empty(shape, dtype=torch.int8, device=w_OI.device).view(torch.float8_e4m3fn)
    if not is_counted:
        return OperandMemory(None, rows_OI, columns_IP, None)
    counts_3N = torch.empty(3, num_tiles(w_OI, tile), dtype=torch.int32, device=w_OI.device)
    return OperandMemory(former_rows_OI, rows_OI, columns_IP, counts_3N)


def num_tiles(w_OI: torch.Tensor, tile: dict) -> int:
    """Tiles of all matrices."""
    *batch, num_rows, num_columns = w_OI.shape
    return math.prod(batch) * triton.cdiv(num_rows, tile["BLOCK_O"]) * triton.cdiv(num_columns, tile["BLOCK_I"])


def ternary_operands_triton(
    w_OI: torch.Tensor,
    scale_G: torch.Tensor,
    axis: int,
    row_dtype: torch.dtype,
    with_columns: bool,
    former: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    is_counted: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Codes [..., O, I] in ``row_dtype``, transposed codes e4m3 [..., I, P] if wanted, and counts int64 [3] likewise.

    The rows and columns of ``former`` are overwritten where they have the type and layout that is wanted.
    """
    w_OI, scale_G = w_OI.contiguous(), scale_G.contiguous()
    num_rows, num_columns = w_OI.shape[-2:]
    memory = operand_memory(w_OI, row_dtype, with_columns, former, is_counted, OPERANDS_TILE)
    if tiles := num_tiles(w_OI, OPERANDS_TILE):
        with torch.cuda.device_of(w_OI):
            _ternary_operands_kernel[(tiles,)](
                w_OI,
                scale_G,
                *memory.arguments(),
                num_rows,
                scale_G.shape[-1],
                NUM_COLUMNS=num_columns,
                BY_ROW=axis == -2,
                SCALE_SIZE=w_OI.shape[axis] // scale_G.shape[-1],
                **memory.constants(),
                **OPERANDS_TILE,
            )
    return memory.result()


@triton.jit
def _ternary_operands_kernel(
    w_ptr,
    scale_ptr,
    former_ptr,
    rows_ptr,
    columns_ptr,
    counts_ptr,
    num_rows,
    num_scales,
    NUM_COLUMNS: tl.constexpr,
    BY_ROW: tl.constexpr,
    SCALE_SIZE: tl.constexpr,
    ROWS_ARE_FLOAT8: tl.constexpr,
    HAS_FORMER: tl.constexpr,
    FORMER_IS_FLOAT8: tl.constexpr,
    WITH_COLUMNS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    write_operands(
        tl.program_id(0),
        tl.num_programs(0),
        w_ptr,
        scale_ptr,
        former_ptr,
        rows_ptr,
        columns_ptr,
        counts_ptr,
        num_rows,
        num_scales,
        NUM_COLUMNS,
        BY_ROW,
        SCALE_SIZE,
        ROWS_ARE_FLOAT8,
        HAS_FORMER,
        FORMER_IS_FLOAT8,
        WITH_COLUMNS,
        BLOCK_O,
        BLOCK_I,
    )


@triton.jit
def write_operands(
    tile,
    num_tiles,
    w_ptr,
    scale_ptr,
    former_ptr,
    rows_ptr,
    columns_ptr,
    counts_ptr,
    num_rows,
    num_scales,
    NUM_COLUMNS: tl.constexpr,
    BY_ROW: tl.constexpr,
    SCALE_SIZE: tl.constexpr,
    ROWS_ARE_FLOAT8: tl.constexpr,
    HAS_FORMER: tl.constexpr,
    FORMER_IS_FLOAT8: tl.constexpr,
    WITH_COLUMNS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Codes of one tile of all matrices, and its counts."""
    blocks_o, blocks_i = tl.cdiv(num_rows, BLOCK_O), tl.cdiv(NUM_COLUMNS, BLOCK_I)
    first_o, first_i = tile // blocks_i % blocks_o * BLOCK_O, tile % blocks_i * BLOCK_I
    matrix = (tile // blocks_i // blocks_o).to(tl.int64)
    # The first row of every four.
    rows, columns = 4 * tl.arange(0, BLOCK_O // 4), tl.arange(0, BLOCK_I)
    offs_o, offs_i = rows[:, None], columns[None, :]
    offs = offs_o * NUM_COLUMNS + offs_i
    first = (matrix * num_rows + first_o) * NUM_COLUMNS + first_i
    w_ptr += first
    rows_ptr += first
    scale_ptr += matrix * num_scales
    rows_left, columns_left = num_rows - first_o, NUM_COLUMNS - first_i
    mask_i = offs_i < columns_left
    # Spelled out, so that all loads are under way before the first result is needed.
    mask_0, mask_1 = (offs_o < rows_left) & mask_i, (offs_o + 1 < rows_left) & mask_i
    mask_2, mask_3 = (offs_o + 2 < rows_left) & mask_i, (offs_o + 3 < rows_left) & mask_i
    w_0 = tl.load(w_ptr + offs, mask=mask_0, other=0.0, eviction_policy="evict_first")
    w_1 = tl.load(w_ptr + offs + NUM_COLUMNS, mask=mask_1, other=0.0, eviction_policy="evict_first")
    w_2 = tl.load(w_ptr + offs + 2 * NUM_COLUMNS, mask=mask_2, other=0.0, eviction_policy="evict_first")
    w_3 = tl.load(w_ptr + offs + 3 * NUM_COLUMNS, mask=mask_3, other=0.0, eviction_policy="evict_first")
    former_0, former_1, former_2, former_3 = 0, 0, 0, 0
    if HAS_FORMER:
        former_ptr += first
        former_0 = tl.load(former_ptr + offs, mask=mask_0, other=0)
        former_1 = tl.load(former_ptr + offs + NUM_COLUMNS, mask=mask_1, other=0)
        former_2 = tl.load(former_ptr + offs + 2 * NUM_COLUMNS, mask=mask_2, other=0)
        former_3 = tl.load(former_ptr + offs + 3 * NUM_COLUMNS, mask=mask_3, other=0)
        # The rows may be written over them, by threads that did not read the same place (seen for I = 5460).
        tl.debug_barrier()
    # One-dimensional loads: as [1, BLOCK_I] they made Triton change the layout of every tile.
    if BY_ROW:
        half_0 = _half_scale(scale_ptr, first_o + rows, rows < rows_left, SCALE_SIZE)[:, None]
        half_1 = _half_scale(scale_ptr, first_o + rows + 1, rows + 1 < rows_left, SCALE_SIZE)[:, None]
        half_2 = _half_scale(scale_ptr, first_o + rows + 2, rows + 2 < rows_left, SCALE_SIZE)[:, None]
        half_3 = _half_scale(scale_ptr, first_o + rows + 3, rows + 3 < rows_left, SCALE_SIZE)[:, None]
    else:
        half_0 = _half_scale(scale_ptr, first_i + columns, columns < columns_left, SCALE_SIZE)[None, :]
        half_1, half_2, half_3 = half_0, half_0, half_0
    word = tl.zeros([BLOCK_O // 4, BLOCK_I], tl.int32)
    word = _write_row(w_0, half_0, rows_ptr + offs, mask_0, word, ROWS_ARE_FLOAT8)
    word = _write_row(w_1, half_1, rows_ptr + offs + NUM_COLUMNS, mask_1, word, ROWS_ARE_FLOAT8)
    word = _write_row(w_2, half_2, rows_ptr + offs + 2 * NUM_COLUMNS, mask_2, word, ROWS_ARE_FLOAT8)
    word = _write_row(w_3, half_3, rows_ptr + offs + 3 * NUM_COLUMNS, mask_3, word, ROWS_ARE_FLOAT8)
    if not ROWS_ARE_FLOAT8:
        # From +-2.0, 0x40, to +-1.0, 0x38.
        word -= (word >> 3) & 0x08080808
    tally = tl.zeros_like(word)
    if counts_ptr is not None:
        tally = _count_bytes((word >> 3) & 0x01010101)
    if HAS_FORMER:
        former = (
            (former_3.to(tl.int32) << 24)
            | ((former_2.to(tl.int32) & 0xFF) << 16)
            | ((former_1.to(tl.int32) & 0xFF) << 8)
            | (former_0.to(tl.int32) & 0xFF)
        )
        if not FORMER_IS_FLOAT8:
            # int8 -1 has all bits set, 1 the lowest one only.
            former = ((former & 0x01010101) * 0x38) | (former & -0x7F7F7F80)
        former ^= word
        tally += _CHANGED * _count_bytes(((former >> 3) | (former >> 7)) & 0x01010101)
    if WITH_COLUMNS:
        padded_words = (num_rows + 15) // 16 * 4
        columns_ptr += (matrix * NUM_COLUMNS + first_i) * padded_words + first_o // 4
        offs_columns = tl.arange(0, BLOCK_I)[:, None]
        offs_words = tl.arange(0, BLOCK_O // 4)[None, :]
        mask = (offs_columns < columns_left) & (offs_words < padded_words - first_o // 4)
        columns_ptrs = columns_ptr + offs_columns * padded_words + offs_words
        tl.store(columns_ptrs, tl.trans(word), mask=mask, eviction_policy="evict_first")
    if counts_ptr is not None:
        tally_of_tile = tl.sum(tally)
        num_codes = tl.minimum(rows_left, BLOCK_O) * tl.minimum(columns_left, BLOCK_I)
        tl.store(counts_ptr + tile, num_codes - tally_of_tile % _CHANGED)
        tl.store(counts_ptr + num_tiles + tile, tally_of_tile // _CHANGED)
        tl.store(counts_ptr + 2 * num_tiles + tile, num_codes)


@triton.jit
def _half_scale(scale_ptr, offs, mask, SCALE_SIZE: tl.constexpr):
    # Past L1: another program of the same launch may have written it (triton_one_launch.py).
    return 0.5 * tl.load(scale_ptr + offs // SCALE_SIZE, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _write_row(w, half_scale, rows_ptr, mask, word, ARE_FLOAT8: tl.constexpr):
    """Write the codes of one row of four, and move them into ``word`` as its highest byte."""
    w = w.to(tl.float32)
    # The highest byte is the e4m3 number 1.0, or 2.0 (whose two highest bits are the integer), with the sign of w.
    ONE: tl.constexpr = 0x38000000 if ARE_FLOAT8 else 0x40000000
    bits = tl.where(tl.abs(w) > half_scale, (w.to(tl.int32, bitcast=True) & -0x80000000) | ONE, 0)
    tl.store(rows_ptr, (bits >> (24 if ARE_FLOAT8 else 30)).to(tl.int8), mask=mask, eviction_policy="evict_first")
    return ((word >> 8) & 0x00FFFFFF) | bits


@triton.jit
def _count_bytes(flags):
    """How many of the four bytes of ``flags`` are 1; the others are 0."""
    return (flags * 0x01010101) >> 24
