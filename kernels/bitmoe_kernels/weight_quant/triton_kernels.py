"""Absmean ternary weight quantization in Triton: sums to fp64 rounding, codes bit for bit equal to reference.py.

What      absmean_sums: one read of W, partial sums of 16384 elements in a fixed order, added up by torch; no
          atomics, so two runs agree. ternary_codes: one read of W, one write of codes.
Contract  bf16, fp16 or fp32 weights; any sizes; W is made contiguous. Groups of rows are contiguous runs of
          weights, groups of columns are rows of a view [..., O, G, d]: both are rows here.
Numerics  fp32 W / scale rounded half to even is above 1/2 exactly where |W| > scale / 2: rounding the quotient
          cannot cross from above 1/2 to 1/2, for |W| is then at least the next float after scale / 2. So no division.
Not here  fp64 weights, argument checks and dispatch (op.py).
"""

# Shapes: O = output rows, I = input columns, G = quantization groups; "..." = any batch, such as experts;
# R rows of D contiguous weights = view of a kernel.

import torch
import triton
import triton.language as tl

_TILE_ELEMENTS = 4096
_TILES_A_PARTIAL_SUM = 4


def absmean_sums_triton(w_OI: torch.Tensor, groups: int, axis: int) -> torch.Tensor:
    """Sum of |w| per group, fp64 [..., G]; ``axis`` is -2 (groups of rows) or -1 (groups of columns)."""
    w_OI = w_OI.contiguous()
    num_columns = w_OI.shape[-1]
    if axis == -1:
        w_ORD = w_OI.view(*w_OI.shape[:-1], groups, num_columns // groups)
        return _row_sums(w_ORD).sum(dim=-2)
    return _row_sums(w_OI.view(*w_OI.shape[:-2], groups, w_OI.shape[-2] // groups * num_columns))


def ternary_codes_triton(w_OI: torch.Tensor, scale_G: torch.Tensor, axis: int) -> torch.Tensor:
    """Codes int8 [..., O, I] in {-1, 0, 1} under fp32 scales [..., G]; 0 where the scale is NaN."""
    w_OI, scale_G = w_OI.contiguous(), scale_G.contiguous()
    codes_OI = torch.empty_like(w_OI, dtype=torch.int8)
    (num_outputs, num_columns), groups = w_OI.shape[-2:], scale_G.shape[-1]
    # Row r has scale number r // rows_per_cycle * scales_per_cycle + r % scales_per_cycle.
    if axis == -1:
        num_features, rows_per_cycle, scales_per_cycle = num_columns // groups, num_outputs * groups, groups
    else:
        num_features, rows_per_cycle, scales_per_cycle = num_columns, num_outputs // groups, 1
    if num_rows := w_OI.numel() // num_features:
        tile = _tile(num_features)
        num_blocks = triton.cdiv(num_features, tile["BLOCK_D"])
        with torch.cuda.device_of(w_OI):
            _ternary_codes_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]) * num_blocks,)](
                w_OI, scale_G, codes_OI, num_rows, rows_per_cycle, scales_per_cycle, num_features, num_blocks, **tile
            )
    return codes_OI


def _row_sums(w_RD: torch.Tensor) -> torch.Tensor:
    """Sum of |w| over the last dimension, fp64 [..., R]."""
    num_features = w_RD.shape[-1]
    tile = _tile(num_features)
    num_parts = triton.cdiv(num_features, tile["BLOCK_D"] * _TILES_A_PARTIAL_SUM)
    parts_RP = torch.empty(*w_RD.shape[:-1], num_parts, dtype=torch.float64, device=w_RD.device)
    if num_rows := parts_RP.numel() // num_parts:
        with torch.cuda.device_of(w_RD):
            _abs_sum_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]) * num_parts,)](
                w_RD, parts_RP, num_rows, num_features, num_parts, _TILES_A_PARTIAL_SUM, **tile
            )
    return parts_RP.squeeze(-1) if num_parts == 1 else parts_RP.sum(dim=-1)


def _tile(num_features: int) -> dict[str, int]:
    """A tile of 4096 elements, 32 a thread: part of a long row, or several short ones."""
    block = min(triton.next_power_of_2(num_features), _TILE_ELEMENTS)
    return {"BLOCK_ROWS": _TILE_ELEMENTS // block, "BLOCK_D": block, "num_warps": 4}


@triton.jit
def _abs_sum_kernel(
    w_ptr,
    parts_ptr,
    num_rows,
    NUM_FEATURES: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_rows, pid_part = tl.program_id(0) // NUM_PARTS, tl.program_id(0) % NUM_PARTS
    rows = pid_rows.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask_rows = rows < num_rows
    sums = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float64)
    for tile in range(NUM_TILES):
        features = (pid_part * NUM_TILES + tile).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = mask_rows[:, None] & (features < NUM_FEATURES)[None, :]
        w = tl.load(w_ptr + rows[:, None] * NUM_FEATURES + features[None, :], mask=mask, other=0.0)
        sums += tl.abs(w.to(tl.float64))
    tl.store(parts_ptr + rows * NUM_PARTS + pid_part, tl.sum(sums, axis=1), mask=mask_rows)


@triton.jit
def _ternary_codes_kernel(
    w_ptr,
    scale_ptr,
    codes_ptr,
    num_rows,
    ROWS_PER_CYCLE: tl.constexpr,
    SCALES_PER_CYCLE: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_rows, pid_block = tl.program_id(0) // NUM_BLOCKS, tl.program_id(0) % NUM_BLOCKS
    rows = pid_rows.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    features = pid_block.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_rows = rows < num_rows
    mask = mask_rows[:, None] & (features < NUM_FEATURES)[None, :]
    offs = rows[:, None] * NUM_FEATURES + features[None, :]
    w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    offs_scale = rows // ROWS_PER_CYCLE * SCALES_PER_CYCLE + rows % SCALES_PER_CYCLE
    half_scale = 0.5 * tl.load(scale_ptr + offs_scale, mask=mask_rows, other=0.0)[:, None]
    codes = tl.where(w > half_scale, 1, tl.where(w < -half_scale, -1, 0))
    tl.store(codes_ptr + offs, codes.to(tl.int8), mask=mask)
