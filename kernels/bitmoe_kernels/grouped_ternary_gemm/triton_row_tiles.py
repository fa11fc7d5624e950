"""The list of tiles that experts' rows make: which expert, which rows. Computed on the device from ``ends_E``.

No size is known to the host: lists and grids have a static bound, and programs past the end of the list leave at once.
One small kernel before the others, instead of a search over experts in each tile of each of them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from bitmoe_kernels.grouped_ternary_gemm.reference import PADDING

# Shapes: R = rows sorted by expert, E = experts, S = tiles at most, P = padded rows.

SLOTS_PER_PROGRAM = 32


class RowTiles(NamedTuple):
    """The tiles of all experts' rows, one after the other; an expert's last tile reaches past its rows."""

    table_4S: torch.Tensor
    """int32 [4, S]: expert, first row, end of the expert's rows, and the first row's place among P."""
    count_1: torch.Tensor
    """int32 [1]: tiles in the table; what follows them is not written."""
    padded_ends_E: torch.Tensor
    """int32 [E]: README eq. 2."""


@triton.jit
def _row_tiles_kernel(
    ends_ptr,
    table_ptr,
    count_ptr,
    padded_ends_ptr,
    num_experts,
    max_tiles,
    COVER_PADDING: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    offs_e = tl.arange(0, EXPERTS)
    mask_e = offs_e < num_experts
    starts = tl.load(ends_ptr + offs_e - 1, mask=mask_e & (offs_e > 0), other=0)
    counts = tl.where(mask_e, tl.load(ends_ptr + offs_e, mask=mask_e, other=0) - starts, 0)
    padded = tl.where(mask_e, tl.cdiv(tl.maximum(counts, 1), PADDING) * PADDING, 0)
    tiles = tl.cdiv(padded if COVER_PADDING else counts, BLOCK)
    tile_ends = tl.cumsum(tiles, 0)
    if tl.program_id(0) == 0:
        tl.store(count_ptr, tl.sum(tiles, 0))
        tl.store(padded_ends_ptr + offs_e, tl.cumsum(padded, 0), mask=mask_e)
    slots = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    before = (tile_ends[None, :] <= slots[:, None]) & mask_e[None, :]  # [SLOTS, EXPERTS]
    expert = tl.sum(before.to(tl.int32), 1)
    offset = (slots - tl.sum(tl.where(before, tiles[None, :], 0), 1)) * BLOCK
    start = tl.sum(tl.where(before, counts[None, :], 0), 1)
    count = tl.sum(tl.where(offs_e[None, :] == expert[:, None], counts[None, :], 0), 1)
    mask = (expert < num_experts) & (slots < max_tiles)
    tl.store(table_ptr + slots, expert, mask=mask)
    tl.store(table_ptr + max_tiles + slots, start + offset, mask=mask)
    tl.store(table_ptr + 2 * max_tiles + slots, start + count, mask=mask)
    column = tl.sum(tl.where(before, padded[None, :], 0), 1) + offset
    tl.store(table_ptr + 3 * max_tiles + slots, column, mask=mask)


def row_tiles(ends_E: torch.Tensor, max_rows: int, block: int, *, padding: int | None = None) -> RowTiles:
    """List tiles of ``block`` rows, of the experts' rows or of their rows among P, padded to a multiple of ``padding``.

    ``max_rows`` is R or P. An expert has at most one tile that is not full, hence the bound on their number.
    """
    num_experts = len(ends_E)
    max_tiles = max_rows // block + num_experts
    memory = ends_E.new_empty(4 * max_tiles + 1 + num_experts)
    tiles = RowTiles(memory[: 4 * max_tiles].view(4, max_tiles), *memory[4 * max_tiles :].split([1, num_experts]))
    _row_tiles_kernel[(triton.cdiv(max_tiles, SLOTS_PER_PROGRAM),)](
        ends_E,
        *tiles,
        num_experts,
        max_tiles,
        COVER_PADDING=padding is not None,
        PADDING=padding or PADDING,
        BLOCK=block,
        EXPERTS=triton.next_power_of_2(num_experts),
        SLOTS=SLOTS_PER_PROGRAM,
        num_warps=4,
    )
    return tiles
