"""Ternary codes of weights in Triton, in the layouts of 8-bit products: bit for bit those of reference.py.

What      One read of W and of the former codes, one write of codes in each layout, and counts.
Contract  bf16, fp16 or fp32 weights; any sizes; W is made contiguous. Former codes may be overwritten in place.
Tiling    Where rows are even, 16-bit weights are read, compared and written two at a time (triton_pair_codes.py). Four
          rows of codes make words of four bytes along the outputs, which are transposed as a whole: a quarter of the
          traffic through shared memory that single bytes would take.
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
from bitmoe_kernels.weight_quant.triton_pair_codes import (
    bytes_of_pairs,
    columns_of_four_rows,
    float8_codes,
    float8_of_int8,
    int8_codes,
    limit_bits,
    paired,
    pairs_of_bytes,
    signs_of_pairs,
    signs_of_weights,
)

OPERANDS_TILE = {"BLOCK_O": 64, "BLOCK_I": 128, "num_warps": 4}


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

    def constants(self, w_OI: torch.Tensor) -> dict[str, bool]:
        """Constants of the compiled kernel."""
        places = [w_OI.data_ptr() // 2, *(x.data_ptr() for x in (self.former_rows, self.rows) if x is not None)]
        return {
            "IS_PAIRED": w_OI.element_size() == 2 and not any(x % 2 for x in (w_OI.shape[-1], *places)),
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
    scale_size = w_OI.shape[axis] // scale_G.shape[-1]
    is_one_a_tile = axis == -2 and (scale_G.shape[-1] == 1 or scale_size % OPERANDS_TILE["BLOCK_O"] == 0)
    scales = "tile" if is_one_a_tile else "rows" if axis == -2 else "columns"
    if tiles := num_tiles(w_OI, OPERANDS_TILE):
        with torch.cuda.device_of(w_OI):
            _ternary_operands_kernel[(tiles,)](
                w_OI,
                scale_G,
                *memory.arguments(),
                num_rows,
                scale_G.shape[-1],
                NUM_COLUMNS=num_columns,
                SCALES=scales,
                SCALE_SIZE=scale_size,
                **memory.constants(w_OI),
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
    SCALES: tl.constexpr,
    SCALE_SIZE: tl.constexpr,
    IS_PAIRED: tl.constexpr,
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
        SCALES,
        SCALE_SIZE,
        IS_PAIRED,
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
    SCALES: tl.constexpr,
    SCALE_SIZE: tl.constexpr,
    IS_PAIRED: tl.constexpr,
    ROWS_ARE_FLOAT8: tl.constexpr,
    HAS_FORMER: tl.constexpr,
    FORMER_IS_FLOAT8: tl.constexpr,
    WITH_COLUMNS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Codes of one tile of all matrices, and its counts."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    # What is read and written at once: two weights as a word and the bytes of their codes, or one.
    WIDTH: tl.constexpr = 2 if IS_PAIRED else 1
    PITCH: tl.constexpr = NUM_COLUMNS // WIDTH
    if IS_PAIRED:
        w_ptr = w_ptr.to(tl.pointer_type(tl.uint32))
        rows_ptr = rows_ptr.to(tl.pointer_type(tl.int16))
    blocks_o, blocks_i = tl.cdiv(num_rows, BLOCK_O), tl.cdiv(NUM_COLUMNS, BLOCK_I)
    first_o, first_i = tile // blocks_i % blocks_o * BLOCK_O, tile % blocks_i * BLOCK_I
    matrix = (tile // blocks_i // blocks_o).to(tl.int64)
    rows_left, columns_left = num_rows - first_o, NUM_COLUMNS - first_i
    scale_ptr += matrix * num_scales
    # The first row of every four.
    offs_o, offs_i = 4 * tl.arange(0, BLOCK_O // 4)[:, None], tl.arange(0, BLOCK_I // WIDTH)[None, :]
    offs = (matrix * num_rows + first_o) * PITCH + first_i // WIDTH + (offs_o * PITCH + offs_i)
    # All loads are under way before the first result is needed.
    masks, weights, former = (), (), ()
    for row in tl.static_range(4):
        mask = (offs_o < rows_left - row) & (offs_i < columns_left // WIDTH)
        masks = masks + (mask,)
        w = tl.load(w_ptr + offs + row * PITCH, mask=mask, other=0, eviction_policy="evict_first")
        weights = weights + (w,)
    if HAS_FORMER:
        for row in tl.static_range(4):
            former = former + (_former_codes(former_ptr, offs + row * PITCH, masks[row], IS_PAIRED, FORMER_IS_FLOAT8),)
        # The rows may be written over them, by threads that did not read the same place (seen for I = 5460).
        tl.debug_barrier()
    codes = ()
    for row in tl.static_range(4):
        limits = _limits(
            scale_ptr,
            row,
            first_o,
            first_i,
            rows_left,
            columns_left,
            dtype,
            IS_PAIRED,
            SCALES,
            SCALE_SIZE,
            BLOCK_O,
            BLOCK_I,
        )
        if IS_PAIRED:
            nonzero, negative = signs_of_pairs(weights[row], limits, dtype)
        else:
            nonzero, negative = signs_of_weights(weights[row], limits)
        code = float8_codes(nonzero, negative)
        row_code = code if ROWS_ARE_FLOAT8 else int8_codes(nonzero, negative)
        row_bytes = bytes_of_pairs(row_code) if IS_PAIRED else (row_code >> 8).to(tl.int8)
        tl.store(rows_ptr + offs + row * PITCH, row_bytes, mask=masks[row], eviction_policy="evict_first")
        codes = codes + (code if IS_PAIRED else paired(code),)
    if WITH_COLUMNS:
        padded_words = (num_rows + 15) // 16 * 4
        left, right = columns_of_four_rows(codes[0], codes[1], codes[2], codes[3])
        words = tl.reshape(tl.join(left, right), [BLOCK_O // 4, BLOCK_I])
        offs_columns, offs_words = tl.arange(0, BLOCK_I)[:, None], tl.arange(0, BLOCK_O // 4)[None, :]
        columns_ptr += (matrix * NUM_COLUMNS + first_i) * padded_words + first_o // 4
        mask = (offs_columns < columns_left) & (offs_words < padded_words - first_o // 4)
        columns_ptrs = columns_ptr + offs_columns * padded_words + offs_words
        tl.store(columns_ptrs, tl.trans(words), mask=mask, eviction_policy="evict_first")
    if counts_ptr is not None:
        num_codes = tl.minimum(rows_left, BLOCK_O) * tl.minimum(columns_left, BLOCK_I)
        nonzeros, changes = tl.zeros_like(codes[0]), tl.zeros_like(codes[0])
        for row in tl.static_range(4):
            nonzeros += codes[row] >> 11 & 0x00010001
            if HAS_FORMER:
                difference = codes[row] ^ former[row]
                changes += (difference >> 11 | difference >> 15) & 0x00010001
        tl.store(counts_ptr + tile, num_codes - _sum_of_halves(nonzeros))
        tl.store(counts_ptr + num_tiles + tile, _sum_of_halves(changes))
        tl.store(counts_ptr + 2 * num_tiles + tile, num_codes)


@triton.jit
def _former_codes(former_ptr, offs, mask, IS_PAIRED: tl.constexpr, ARE_FLOAT8: tl.constexpr):
    """Former codes of a row of every four as words of :func:`float8_codes`."""
    if IS_PAIRED:
        words = pairs_of_bytes(tl.load(former_ptr.to(tl.pointer_type(tl.int16)) + offs, mask=mask, other=0))
    else:
        words = paired((tl.load(former_ptr + offs, mask=mask, other=0).to(tl.uint32) & 0xFF) << 8)
    return words if ARE_FLOAT8 else float8_of_int8(words)


@triton.jit
def _limits(
    scale_ptr,
    row: tl.constexpr,
    first_o,
    first_i,
    rows_left,
    columns_left,
    dtype: tl.constexpr,
    IS_PAIRED: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_SIZE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """What magnitudes of the rows ``row`` of every four are compared with: words of limits for pairs, or scales / 2."""
    # One-dimensional loads: as [1, BLOCK_I] they made Triton change the layout of every tile.
    if SCALES != "columns":
        if SCALES == "tile":
            half = _half_scale(scale_ptr, first_o // SCALE_SIZE, None)
        else:
            rows = row + 4 * tl.arange(0, BLOCK_O // 4)
            half = _half_scale(scale_ptr, (first_o + rows) // SCALE_SIZE, rows < rows_left)[:, None]
        return limit_bits(half, dtype) * 0x10001 if IS_PAIRED else half
    elif IS_PAIRED:
        left = 2 * tl.arange(0, BLOCK_I // 2)
        left_half = _half_scale(scale_ptr, (first_i + left) // SCALE_SIZE, left < columns_left)
        right_half = _half_scale(scale_ptr, (first_i + left + 1) // SCALE_SIZE, left < columns_left)
        return (limit_bits(left_half, dtype) | limit_bits(right_half, dtype) << 16)[None, :]
    else:
        columns = tl.arange(0, BLOCK_I)
        return _half_scale(scale_ptr, (first_i + columns) // SCALE_SIZE, columns < columns_left)[None, :]


@triton.jit
def _half_scale(scale_ptr, offs, mask):
    # Past L1: another program of the same launch may have written it (triton_one_launch.py).
    if mask is None:
        return 0.5 * tl.load(scale_ptr + offs, cache_modifier=".cg")
    else:
        return 0.5 * tl.load(scale_ptr + offs, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _sum_of_halves(words):
    return tl.sum((words & 0xFFFF) + (words >> 16)).to(tl.int32)
