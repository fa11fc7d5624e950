"""Absmean scales of weights in Triton: sums to fp64 rounding.

What      One read of W, partial sums in a fixed order and one small kernel that adds them up; no atomics, so two runs
          agree.
Contract  bf16, fp16 or fp32 weights; any sizes; W is made contiguous.
Numerics  every |W| is converted to fp64; 16 a clock and processor (sm_90) are more than memory delivers.
Not here  codes (triton_operands.py), fp64 weights, argument checks and dispatch (op.py).
"""

# Shapes: O = output rows, I = input columns, G = quantization groups, S = scales that rows share by id,
#         Q = partial sums of a group; "..." or B = any batch, such as experts.

import math

import torch
import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import to_float32
from bitmoe_kernels.weight_quant.reference import MIN_SCALE

_SUM_TILE = 4096
_TILES_A_PART = 4


def absmean_sums_triton(w_OI: torch.Tensor, groups: int, axis: int) -> torch.Tensor:
    """Sum of |w| per group, fp64 [..., G]; ``axis`` is -2 (groups of rows) or -1 (groups of columns)."""
    batch, (num_rows, num_columns) = w_OI.shape[:-2], w_OI.shape[-2:]
    if axis == -1:
        w_BRGd = w_OI.reshape(math.prod(batch), num_rows, groups, num_columns // groups)
    else:
        w_BRGd = w_OI.reshape(math.prod(batch) * groups, num_rows // groups, 1, num_columns)
    parts_BQG = _partial_sums(w_BRGd, _TILES_A_PART)
    if parts_BQG.shape[1] > 1:
        parts_BQG = _added_parts(parts_BQG, parts_BQG.shape[2])[0]
    return parts_BQG.view(*batch, groups)


def absmean_sums_by_id_triton(
    w_OI: torch.Tensor, scale_ids_O: torch.Tensor, num_scales: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of |w| over the rows of each id, fp64 [..., S], and how many weights of a matrix these are, int64 [S]."""
    batch, (num_rows, num_columns) = w_OI.shape[:-2], w_OI.shape[-2:]
    # A sum a row: their ids may lie anyhow.
    row_sums_BO = _partial_sums(w_OI.reshape(math.prod(batch) * num_rows, 1, 1, num_columns), _TILES_A_PART)
    row_sums_BO = row_sums_BO.view(math.prod(batch), num_rows)
    sums_BS, counts_S = _added_parts(row_sums_BO, num_scales, scale_ids_O.contiguous(), num_columns)
    return sums_BS.view(*batch, num_scales), counts_S


def absmean_scale_triton(
    sums_S: torch.Tensor, count: int | torch.Tensor, scale_ids_O: torch.Tensor | None
) -> torch.Tensor:
    """Scale fp32 [..., S] from fp64 sums over ``count`` values, int or [S]; given ids, that of each row [..., O]."""
    num_scales = sums_S.shape[-1]
    num_outputs = num_scales if scale_ids_O is None else len(scale_ids_O)
    scale = sums_S.new_empty(*sums_S.shape[:-1], num_outputs, dtype=torch.float32)
    if scale.numel():
        with torch.cuda.device_of(sums_S):
            _absmean_scale_kernel[(triton.cdiv(scale.numel(), 256),)](
                sums_S.contiguous(),
                count,
                scale_ids_O,
                scale,
                scale.numel(),
                num_outputs,
                num_scales,
                COUNT_IS_TENSOR=isinstance(count, torch.Tensor),
                MIN_SCALE=MIN_SCALE,
                BLOCK=256,
            )
    return scale


def _partial_sums(w_BRGd: torch.Tensor, max_tiles: int) -> torch.Tensor:
    """Sums of |w| over d and a few of the R rows, fp64 [B, Q, G]; a part reads at most ``max_tiles`` tiles of rows."""
    w_BRGd = w_BRGd.contiguous()
    num_matrices, num_rows, groups, num_features = w_BRGd.shape
    # Not one feature: bf16 numbers are converted in pairs.
    block_d = min(max(2, triton.next_power_of_2(num_features)), _SUM_TILE)
    block_rows = min(triton.next_power_of_2(num_rows), _SUM_TILE // block_d)
    part_rows = block_rows * min(max_tiles, triton.cdiv(num_rows, block_rows))
    num_parts = triton.cdiv(num_rows, part_rows)
    parts_BQG = torch.empty(num_matrices, num_parts, groups, dtype=torch.float64, device=w_BRGd.device)
    if parts_BQG.numel():
        with torch.cuda.device_of(w_BRGd):
            _abs_sum_kernel[(parts_BQG.numel(),)](
                w_BRGd,
                parts_BQG,
                num_rows,
                num_parts,
                GROUPS=groups,
                NUM_FEATURES=num_features,
                PART_ROWS=part_rows,
                BLOCK_ROWS=block_rows,
                BLOCK_D=block_d,
                num_warps=4,
            )
    return parts_BQG


def _added_parts(
    parts: torch.Tensor, num_scales: int, scale_ids_Q: torch.Tensor | None = None, part_size: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Add parts fp64 [B, Q, S], or [B, Q] by their ids [Q]: sums [B, S] and, given ids, how many numbers these are."""
    sums_BS = torch.empty(parts.shape[0], num_scales, dtype=torch.float64, device=parts.device)
    counts_S = None if scale_ids_Q is None else scale_ids_Q.new_zeros(num_scales)
    if sums_BS.numel():
        with torch.cuda.device_of(parts):
            _add_parts_kernel[(sums_BS.numel(),)](
                parts,
                scale_ids_Q,
                sums_BS,
                counts_S,
                parts.shape[1],
                num_scales,
                part_size,
                BY_ID=scale_ids_Q is not None,
                BLOCK=2048,
                num_warps=8,
            )
    return sums_BS, counts_S


@triton.jit
def _abs_sum_kernel(
    w_ptr,
    parts_ptr,
    num_rows,
    num_parts,
    GROUPS: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    PART_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    group, part, matrix = pid % GROUPS, pid // GROUPS % num_parts, pid // GROUPS // num_parts
    first_row = part * PART_ROWS
    w_ptr += ((matrix.to(tl.int64) * num_rows + first_row) * GROUPS + group) * NUM_FEATURES
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    sums = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float64)
    for tile_row in range(0, PART_ROWS, BLOCK_ROWS):
        for tile_feature in range(0, NUM_FEATURES, BLOCK_D):
            features = tile_feature + tl.arange(0, BLOCK_D)[None, :]
            mask = (first_row + tile_row + rows < num_rows) & (features < NUM_FEATURES)
            w = tl.load(w_ptr + (tile_row + rows) * (GROUPS * NUM_FEATURES) + features, mask=mask, other=0.0)
            sums += abs_as_fp64(w)
    tl.store(parts_ptr + pid, tl.sum(sums))


@triton.jit
def abs_as_fp64(w):
    """|w| in fp64."""
    return tl.abs(to_float32(w).to(tl.float64))


@triton.jit
def _add_parts_kernel(
    parts_ptr,
    ids_ptr,
    sums_ptr,
    counts_ptr,
    num_parts,
    num_scales,
    part_size,
    BY_ID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    scale, matrix = pid % num_scales, (pid // num_scales).to(tl.int64)
    sums = tl.zeros([BLOCK], tl.float64)
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_parts, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < num_parts
        if BY_ID:
            parts = tl.load(parts_ptr + matrix * num_parts + offs, mask=mask, other=0.0)
            is_mine = tl.load(ids_ptr + offs, mask=mask, other=-1) == scale
            sums += tl.where(is_mine, parts, 0.0)
            counts += is_mine.to(tl.int32)
        else:
            sums += tl.load(parts_ptr + (matrix * num_parts + offs) * num_scales + scale, mask=mask, other=0.0)
    tl.store(sums_ptr + pid, tl.sum(sums))
    if BY_ID:
        tl.store(counts_ptr + scale, tl.sum(counts).to(tl.int64) * part_size, mask=matrix == 0)


@triton.jit(do_not_specialize=["count"])
def _absmean_scale_kernel(
    sums_ptr,
    count,
    ids_ptr,
    scale_ptr,
    numel,
    num_outputs,
    num_scales,
    COUNT_IS_TENSOR: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    scale_ids = offs % num_outputs
    if ids_ptr is not None:
        scale_ids = tl.load(ids_ptr + scale_ids, mask=mask, other=0)
    divisors = tl.load(count + scale_ids, mask=mask, other=1) if COUNT_IS_TENSOR else tl.full([BLOCK], count, tl.int64)
    sums = tl.load(sums_ptr + offs // num_outputs * num_scales + scale_ids, mask=mask, other=0.0)
    tl.store(scale_ptr + offs, scale_of_sum(sums, divisors, MIN_SCALE), mask=mask)


@triton.jit
def scale_of_sum(sums, count, MIN_SCALE: tl.constexpr):
    """README eq. 2; NaN where the sum is not finite."""
    mean = (sums / count.to(tl.float64)).to(tl.float32)
    return tl.where(tl.abs(mean) < float("inf"), tl.maximum(mean, MIN_SCALE), float("nan"))
