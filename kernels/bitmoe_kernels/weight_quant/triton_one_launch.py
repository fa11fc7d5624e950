"""Scales and codes of many small matrices (experts) in one launch: codes are made while the weights still lie in L2.

What      Units, which have a scale each, come one after the other: programs first add up |W| of a unit, later programs
          make its codes. The last one to add writes the scale; the others wait for it. Saves one of two reads of W.
Contract  as triton_absmean.py and triton_operands.py; a unit is a matrix, or one of equal blocks of its rows.
Progress  programs start in the order of their numbers, and none waits for a later one.
Numerics  partial sums are added in a fixed order: two runs agree.
"""

# Shapes: O = output rows, P = O padded to a multiple of 16, I = input columns, U = units, Q = partial sums of a unit;
#         "..." = any batch, such as experts.

import math

import torch
import triton
import triton.language as tl

from bitmoe_kernels.weight_quant.reference import MIN_SCALE
from bitmoe_kernels.weight_quant.triton_absmean import abs_as_fp64, scale_of_sum
from bitmoe_kernels.weight_quant.triton_operands import num_tiles, operand_memory, write_operands

TILE = {"BLOCK_O": 128, "BLOCK_I": 128, "num_warps": 4}
_SUM_TILE = 4096
_TILES_A_PART = 4
# Units whose weights are read before the codes of one are made; 1 and 4 were slower.
_UNITS_AHEAD = 2
_LARGEST_UNIT = 12 << 20
"""Bytes. 64 experts of 2,816 x 2,048 and 2,048 x 1,408: 0.69 -> 0.47 and 0.35 -> 0.24 ms; at 117 MB a unit nothing is
gained (H200, 50 MB of L2)."""


def takes_one_launch(w_OI: torch.Tensor, groups: int, axis: int) -> bool:
    """Whether there are enough units, all small and of whole tiles."""
    num_units = math.prod(w_OI.shape[:-2]) * groups
    is_block = groups == 1 or (axis == -2 and w_OI.shape[-2] // groups % TILE["BLOCK_O"] == 0)
    unit_size = w_OI.nbytes // max(1, num_units)
    return is_block and num_units > _UNITS_AHEAD and 0 < unit_size <= _LARGEST_UNIT


def absmean_operands_triton(
    w_OI: torch.Tensor,
    groups: int,
    row_dtype: torch.dtype,
    with_columns: bool,
    former: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    is_counted: bool = True,
    tile: dict = TILE,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Scale fp32 [..., groups] of equal blocks of rows, and what ``ternary_operands_triton`` returns.

    ``former`` and ``is_counted`` as there; ``tile`` is for tests. A block is whole tiles, or the matrix.
    """
    w_OI = w_OI.contiguous()
    batch, (num_rows, num_columns) = w_OI.shape[:-2], w_OI.shape[-2:]
    memory = operand_memory(w_OI, row_dtype, with_columns, former, is_counted, tile)
    num_units, unit_size = math.prod(batch) * groups, num_rows // groups * num_columns
    num_parts = triton.cdiv(unit_size, _SUM_TILE * _TILES_A_PART)
    tiles_a_unit = num_tiles(w_OI, tile) // num_units
    parts_UQ = torch.empty(num_units, num_parts, dtype=torch.float64, device=w_OI.device)
    progress_2U = torch.zeros(2, num_units, dtype=torch.int32, device=w_OI.device)
    scale_U = torch.empty(num_units, dtype=torch.float32, device=w_OI.device)
    with torch.cuda.device_of(w_OI):
        _absmean_operands_kernel[((num_units + _UNITS_AHEAD) * (num_parts + tiles_a_unit),)](
            w_OI,
            parts_UQ,
            progress_2U,
            scale_U,
            *memory.arguments(),
            num_rows,
            num_units,
            unit_size,
            num_parts,
            tiles_a_unit,
            GROUPS=groups,
            NUM_COLUMNS=num_columns,
            UNIT_ROWS=num_rows // groups,
            **memory.constants(w_OI),
            MIN_SCALE=MIN_SCALE,
            UNITS_AHEAD=_UNITS_AHEAD,
            TILES_A_PART=_TILES_A_PART,
            SUM_TILE=_SUM_TILE,
            PARTS=triton.next_power_of_2(num_parts),
            **tile,
        )
    return scale_U.view(*batch, groups), *memory.result()


@triton.jit
def _absmean_operands_kernel(
    w_ptr,
    parts_ptr,
    progress_ptr,
    scale_ptr,
    former_ptr,
    rows_ptr,
    columns_ptr,
    counts_ptr,
    num_rows,
    num_units,
    unit_size,
    num_parts,
    tiles_a_unit,
    GROUPS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    UNIT_ROWS: tl.constexpr,
    IS_PAIRED: tl.constexpr,
    ROWS_ARE_FLOAT8: tl.constexpr,
    HAS_FORMER: tl.constexpr,
    FORMER_IS_FLOAT8: tl.constexpr,
    WITH_COLUMNS: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    UNITS_AHEAD: tl.constexpr,
    TILES_A_PART: tl.constexpr,
    SUM_TILE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    step = tl.program_id(0) // (num_parts + tiles_a_unit)
    work = tl.program_id(0) % (num_parts + tiles_a_unit)
    if work < num_parts:
        if step < num_units:
            _add_part(
                w_ptr + step.to(tl.int64) * unit_size,
                parts_ptr + step * num_parts,
                progress_ptr + step,
                progress_ptr + num_units + step,
                scale_ptr + step,
                work,
                num_parts,
                unit_size,
                MIN_SCALE,
                TILES_A_PART,
                SUM_TILE,
                PARTS,
            )
    elif step >= UNITS_AHEAD:
        unit = step - UNITS_AHEAD
        while tl.atomic_add(progress_ptr + num_units + unit, 0, sem="acquire") == 0:
            pass
        write_operands(
            unit * tiles_a_unit + work - num_parts,
            num_units * tiles_a_unit,
            w_ptr,
            scale_ptr,
            former_ptr,
            rows_ptr,
            columns_ptr,
            counts_ptr,
            num_rows,
            GROUPS,
            NUM_COLUMNS,
            "tile",
            UNIT_ROWS,
            IS_PAIRED,
            ROWS_ARE_FLOAT8,
            HAS_FORMER,
            FORMER_IS_FLOAT8,
            WITH_COLUMNS,
            BLOCK_O,
            BLOCK_I,
        )


@triton.jit
def _add_part(
    w_ptr,
    parts_ptr,
    num_added_ptr,
    is_ready_ptr,
    scale_ptr,
    part,
    num_parts,
    unit_size,
    MIN_SCALE: tl.constexpr,
    TILES_A_PART: tl.constexpr,
    SUM_TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Add |W| of a part of a unit; the last of them writes the unit's scale."""
    sums = tl.zeros([SUM_TILE], tl.float64)
    for tile in tl.static_range(TILES_A_PART):
        offs = (part * TILES_A_PART + tile) * SUM_TILE + tl.arange(0, SUM_TILE)
        # To stay in L2 until its codes are made, which leave at once: 0.80 -> 0.71 ms by both (64 experts, H200).
        w = tl.load(w_ptr + offs, mask=offs < unit_size, other=0.0, eviction_policy="evict_last")
        sums += abs_as_fp64(w)
    tl.store(parts_ptr + part, tl.sum(sums))
    if tl.atomic_add(num_added_ptr, 1, sem="acq_rel") == num_parts - 1:
        offs_parts = tl.arange(0, PARTS)
        parts = tl.load(parts_ptr + offs_parts, mask=offs_parts < num_parts, other=0.0, cache_modifier=".cg")
        tl.store(scale_ptr, scale_of_sum(tl.sum(parts), tl.full([], unit_size, tl.int64), MIN_SCALE))
        tl.atomic_xchg(is_ready_ptr, 1, sem="release")
