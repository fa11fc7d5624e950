"""Absmean ternary weight quantization in Triton: sums to fp64 rounding, codes bit for bit equal to reference.py.

What      Sums: one read of W, partial sums in a fixed order and one small kernel that adds them up; no atomics, so two
          runs agree. Operands: one read of W and of the former codes, one write of codes in each layout, and counts.
Contract  bf16, fp16 or fp32 weights; any sizes; W is made contiguous. Former codes may be overwritten in place.
Numerics  |W| enters fp64 sums by moving its bits, exactly (README eq. 5): converting would be the bottleneck (16 a
          clock and SM on Hopper, against 64 additions).
          fp32 W / scale rounded half to even is above 1/2 exactly where |W| > scale / 2: rounding the quotient
          cannot cross from above 1/2 to 1/2, for |W| is then at least the next float after scale / 2. So no division.
Tiling    Four rows of codes make words of four bytes along the outputs, which are transposed as a whole: a quarter of
          the traffic through shared memory that single bytes would take.
Not here  fp64 weights, argument checks and dispatch (op.py).
"""

# Shapes: O = output rows, P = O padded with zeros to a multiple of 16, I = input columns, G = quantization groups,
#         S = scales that rows share by id, Q = partial sums of a group, N = programs; "..." or B = any batch, such as
#         experts.

import math

import torch
import triton
import triton.language as tl

from bitmoe_kernels.ternary_gemm.reference import padded_length
from bitmoe_kernels.weight_quant.reference import MIN_SCALE

_SUM_TILE = 4096
_TILES_A_PART = 4
_OPERANDS_TILE = {"BLOCK_O": 64, "BLOCK_I": 128, "num_warps": 4}
# A changed code counts this much in a sum where one other than zero counts 1: more than a tile has codes.
_CHANGED = tl.constexpr(1 << 16)

# Bits of a type as integers; how far they shift to become those of an fp64 number, the bits of infinity, and the
# power of two that the number is then too small by: 2^(1023 - bias of the exponent).
_FLOAT_BITS = {
    torch.bfloat16: (torch.int16, {"SHIFT": 45, "INFINITY": 0x7F80, "FACTOR": 2.0**896}),
    torch.float16: (torch.int16, {"SHIFT": 42, "INFINITY": 0x7C00, "FACTOR": 2.0**1008}),
    torch.float32: (torch.int32, {"SHIFT": 29, "INFINITY": 0x7F800000, "FACTOR": 2.0**896}),
}


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


def ternary_operands_triton(
    w_OI: torch.Tensor,
    scale_G: torch.Tensor,
    axis: int,
    row_dtype: torch.dtype,
    with_columns: bool,
    former: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Codes [..., O, I] in ``row_dtype``, transposed codes e4m3 [..., I, P] if wanted, and counts int64 [3].

    The rows and columns of ``former`` are overwritten where they have the type and layout that is wanted.
    """
    w_OI, scale_G = w_OI.contiguous(), scale_G.contiguous()
    batch, (num_rows, num_columns), num_scales = w_OI.shape[:-2], w_OI.shape[-2:], scale_G.shape[-1]
    former_rows_OI, columns_IP = (None, None) if former is None else former
    rows_OI = former_rows_OI
    if rows_OI is None or rows_OI.dtype != row_dtype:
        rows_OI = torch.empty_like(w_OI, dtype=torch.int8).view(row_dtype)
    if not with_columns:
        columns_IP = None
    elif columns_IP is None:
        shape = (*batch, num_columns, padded_length(num_rows))
        columns_IP = torch.empty(shape, dtype=torch.int8, device=w_OI.device).view(torch.float8_e4m3fn)
    tiles = triton.cdiv(num_rows, _OPERANDS_TILE["BLOCK_O"]) * triton.cdiv(num_columns, _OPERANDS_TILE["BLOCK_I"])
    counts_3N = torch.empty(3, math.prod(batch) * tiles, dtype=torch.int32, device=w_OI.device)
    if counts_3N.numel():
        with torch.cuda.device_of(w_OI):
            _ternary_operands_kernel[(counts_3N.shape[1],)](
                w_OI,
                scale_G,
                None if former_rows_OI is None else former_rows_OI.view(torch.int8),
                rows_OI.view(torch.int8),
                None if columns_IP is None else columns_IP.view(torch.int32),
                counts_3N,
                num_rows,
                num_scales,
                NUM_COLUMNS=num_columns,
                BY_ROW=axis == -2,
                SCALE_SIZE=w_OI.shape[axis] // num_scales,
                ROWS_ARE_FLOAT8=row_dtype == torch.float8_e4m3fn,
                HAS_FORMER=former_rows_OI is not None,
                FORMER_IS_FLOAT8=former_rows_OI is not None and former_rows_OI.dtype == torch.float8_e4m3fn,
                WITH_COLUMNS=with_columns,
                **_OPERANDS_TILE,
            )
    return rows_OI, columns_IP, counts_3N.sum(dim=1)


def _partial_sums(w_BRGd: torch.Tensor, max_tiles: int) -> torch.Tensor:
    """Sums of |w| over d and a few of the R rows, fp64 [B, Q, G]; a part reads at most ``max_tiles`` tiles of rows."""
    w_BRGd = w_BRGd.contiguous()
    num_matrices, num_rows, groups, num_features = w_BRGd.shape
    block_d = min(triton.next_power_of_2(num_features), _SUM_TILE)
    block_rows = min(triton.next_power_of_2(num_rows), _SUM_TILE // block_d)
    part_rows = block_rows * min(max_tiles, triton.cdiv(num_rows, block_rows))
    num_parts = triton.cdiv(num_rows, part_rows)
    parts_BQG = torch.empty(num_matrices, num_parts, groups, dtype=torch.float64, device=w_BRGd.device)
    if parts_BQG.numel():
        bits_dtype, bits = _FLOAT_BITS[w_BRGd.dtype]
        with torch.cuda.device_of(w_BRGd):
            _abs_sum_kernel[(parts_BQG.numel(),)](
                w_BRGd.view(bits_dtype),
                parts_BQG,
                num_rows,
                num_parts,
                GROUPS=groups,
                NUM_FEATURES=num_features,
                PART_ROWS=part_rows,
                **bits,
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
    bits_ptr,
    parts_ptr,
    num_rows,
    num_parts,
    GROUPS: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    PART_ROWS: tl.constexpr,
    SHIFT: tl.constexpr,
    INFINITY: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    group, part, matrix = pid % GROUPS, pid // GROUPS % num_parts, pid // GROUPS // num_parts
    first_row = part * PART_ROWS
    bits_ptr += ((matrix.to(tl.int64) * num_rows + first_row) * GROUPS + group) * NUM_FEATURES
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    sums = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float64)
    for tile_row in range(0, PART_ROWS, BLOCK_ROWS):
        for tile_feature in range(0, NUM_FEATURES, BLOCK_D):
            features = tile_feature + tl.arange(0, BLOCK_D)[None, :]
            mask = (first_row + tile_row + rows < num_rows) & (features < NUM_FEATURES)
            bits = tl.load(bits_ptr + (tile_row + rows) * (GROUPS * NUM_FEATURES) + features, mask=mask, other=0)
            sums += _abs_as_fp64(bits, SHIFT, INFINITY)
    tl.store(parts_ptr + pid, tl.sum(sums) * FACTOR)


@triton.jit
def _abs_as_fp64(bits, SHIFT: tl.constexpr, INFINITY: tl.constexpr):
    """README eq. 5: |x| / FACTOR in fp64 from the bits of x; Inf and NaN stay what they are."""
    ALL_EXPONENTS: tl.constexpr = (0x7FF << 52) - (INFINITY << SHIFT)
    magnitude = bits & (0x7FFFFFFF if bits.dtype.primitive_bitwidth == 32 else 0x7FFF)
    wide = magnitude.to(tl.int64) << SHIFT
    return tl.where(magnitude >= INFINITY, wide + ALL_EXPONENTS, wide).to(tl.float64, bitcast=True)


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
    mean = (sums / divisors.to(tl.float64)).to(tl.float32)
    scale = tl.where(tl.abs(mean) < float("inf"), tl.maximum(mean, MIN_SCALE), float("nan"))
    tl.store(scale_ptr + offs, scale, mask=mask)


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
    pid = tl.program_id(0)
    blocks_o, blocks_i = tl.cdiv(num_rows, BLOCK_O), tl.cdiv(NUM_COLUMNS, BLOCK_I)
    first_o, first_i = pid // blocks_i % blocks_o * BLOCK_O, pid % blocks_i * BLOCK_I
    matrix = (pid // blocks_i // blocks_o).to(tl.int64)
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
    w_0 = tl.load(w_ptr + offs, mask=mask_0, other=0.0)
    w_1 = tl.load(w_ptr + offs + NUM_COLUMNS, mask=mask_1, other=0.0)
    w_2 = tl.load(w_ptr + offs + 2 * NUM_COLUMNS, mask=mask_2, other=0.0)
    w_3 = tl.load(w_ptr + offs + 3 * NUM_COLUMNS, mask=mask_3, other=0.0)
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
        tl.store(columns_ptr + offs_columns * padded_words + offs_words, tl.trans(word), mask=mask)
    tally_of_tile = tl.sum(tally)
    num_codes = tl.minimum(rows_left, BLOCK_O) * tl.minimum(columns_left, BLOCK_I)
    tl.store(counts_ptr + pid, num_codes - tally_of_tile % _CHANGED)
    tl.store(counts_ptr + tl.num_programs(0) + pid, tally_of_tile // _CHANGED)
    tl.store(counts_ptr + 2 * tl.num_programs(0) + pid, num_codes)


@triton.jit
def _half_scale(scale_ptr, offs, mask, SCALE_SIZE: tl.constexpr):
    return 0.5 * tl.load(scale_ptr + offs // SCALE_SIZE, mask=mask, other=0.0)


@triton.jit
def _write_row(w, half_scale, rows_ptr, mask, word, ARE_FLOAT8: tl.constexpr):
    """Write the codes of one row of four, and move them into ``word`` as its highest byte."""
    w = w.to(tl.float32)
    # The highest byte is the e4m3 number 1.0, or 2.0 (whose two highest bits are the integer), with the sign of w.
    ONE: tl.constexpr = 0x38000000 if ARE_FLOAT8 else 0x40000000
    bits = tl.where(tl.abs(w) > half_scale, (w.to(tl.int32, bitcast=True) & -0x80000000) | ONE, 0)
    tl.store(rows_ptr, (bits >> (24 if ARE_FLOAT8 else 30)).to(tl.int8), mask=mask)
    return ((word >> 8) & 0x00FFFFFF) | bits


@triton.jit
def _count_bytes(flags):
    """How many of the four bytes of ``flags`` are 1; the others are 0."""
    return (flags * 0x01010101) >> 24
