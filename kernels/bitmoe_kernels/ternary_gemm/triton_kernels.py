"""Triton kernels of the 8-bit products: an INT8 GEMM with its scales, transposed codes, and the rounding of dY.

Contract  codes int8 (or e4m3 where named), scales fp32, last dimension contiguous; outputs are allocated by the caller.
Numerics  integer sums are exact; scales multiply in fp32 in the order of reference.py, without fused multiply-add, and
          are rounded once: the bits of the reference.
Tiling    8-bit tensor cores take both operands with the contracted dimension contiguous only (sm_90), hence the
          transposed copies. They are written by the kernels that read the data anyway.
Not here  FP8 products (torch._scaled_mm: float8_matmul.py), checks and dispatch (op.py, backward.py).
"""

import torch
import triton
import triton.language as tl

# Shapes: M, N = rows of the two operands, K = contracted, B = batch, C = scale chunks along K,
#         T = tokens, P = T padded with zeros, O = outputs, G = groups of input features, R x C = any code matrix.

# Tiles. A row of 128 codes is one swizzled row of shared memory; 8 warps are two warpgroups. 128 x 256 has 3/4 of the
# L2 traffic of 128 x 128, but with several chunks the fp32 total takes as many registers as the sums: half the tile.
WIDE_TILE = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
SQUARE_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 4}
SHORT_TILE = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
# Tiles of m that are computed next to each other, so that a wave of programs shares its operands in L2.
TILES_PER_STRIP = 8
COPY_TILE = 128


@triton.jit
def _scaled(sums, a_scale_ptrs, b_scale_ptrs, HAS_B_SCALE: tl.constexpr):
    """Integer sums [M, N] times a scale per row, then, where there is one, times a scale per column."""
    scaled = sums.to(tl.float32) * tl.load(a_scale_ptrs)[:, None]
    if HAS_B_SCALE:
        scaled *= tl.load(b_scale_ptrs)[None, :]
    return scaled


@triton.jit
def _scaled_int8_matmul_kernel(
    a_ptr,
    b_ptr,
    a_scale_ptr,
    b_scale_ptr,
    out_ptr,
    num_batches,
    M,
    N,
    K,
    num_chunks,
    chunk_size,
    a_batch_stride,
    a_stride,
    b_batch_stride,
    b_stride,
    b_scale_n_stride,
    b_scale_chunk_stride,
    out_batch_stride,
    out_stride,
    ONE_CHUNK: tl.constexpr,
    HAS_B_SCALE: tl.constexpr,
    TILES_PER_STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    num_tiles = num_batches * tiles_m * tiles_n
    steps_per_chunk = tl.cdiv(chunk_size, BLOCK_K)
    offs_k = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=ONE_CHUNK):
        batch = (tile // (tiles_m * tiles_n)).to(tl.int64)
        tile_in_batch = tile % (tiles_m * tiles_n)
        strip = tile_in_batch // (TILES_PER_STRIP * tiles_n)
        strip_size = min(tiles_m - strip * TILES_PER_STRIP, TILES_PER_STRIP)
        in_strip = tile_in_batch % (TILES_PER_STRIP * tiles_n)
        offs_m = (strip * TILES_PER_STRIP + in_strip % strip_size) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = (in_strip // strip_size) * BLOCK_N + tl.arange(0, BLOCK_N)
        # Rows past the end read row 0 and are not stored: no mask in the main loop for them.
        rows_m = tl.where(offs_m < M, offs_m, 0).to(tl.int64)
        rows_n = tl.where(offs_n < N, offs_n, 0).to(tl.int64)
        a_ptrs = a_ptr + batch * a_batch_stride + rows_m[:, None] * a_stride + offs_k[None, :]
        b_ptrs = b_ptr + batch * b_batch_stride + rows_n[None, :] * b_stride + offs_k[:, None]
        a_scale_ptrs = a_scale_ptr + (batch * M + rows_m) * num_chunks
        b_scale_ptrs = b_scale_ptr + rows_n * b_scale_n_stride
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(num_chunks * steps_per_chunk):
            chunk = step // steps_per_chunk
            start = chunk * chunk_size
            k = (step - chunk * steps_per_chunk) * BLOCK_K
            mask_k = offs_k < min(chunk_size, K - start) - k
            a = tl.load(a_ptrs + (start + k), mask=mask_k[None, :], other=0)  # [BLOCK_M, BLOCK_K]
            b = tl.load(b_ptrs + (start + k), mask=mask_k[:, None], other=0)  # [BLOCK_K, BLOCK_N]
            sums = tl.dot(a, b, sums, out_dtype=tl.int32)
            # One flat loop keeps the loads in flight from chunk to chunk.
            if not ONE_CHUNK and k + BLOCK_K >= chunk_size:
                total += _scaled(sums, a_scale_ptrs + chunk, b_scale_ptrs + chunk * b_scale_chunk_stride, HAS_B_SCALE)
                sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        if ONE_CHUNK:
            total = _scaled(sums, a_scale_ptrs, b_scale_ptrs, HAS_B_SCALE)
        out_ptrs = out_ptr + batch * out_batch_stride + offs_m[:, None].to(tl.int64) * out_stride + offs_n[None, :]
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def scaled_int8_matmul(
    a_BMK: torch.Tensor,
    a_scale_BMC: torch.Tensor,
    b_BNK: torch.Tensor,
    b_scale_NC: torch.Tensor | None,
    chunk_size: int,
    out_BMN: torch.Tensor,
    tile: dict | None = None,
    programs_per_processor: int = 1,
) -> None:
    """out[m, n] = sum over chunks c, in order, of (sum over k in c of a * b) * a_scale[m, c] * b_scale[n, c].

    ``b_scale_NC`` may be expanded (stride 0); None is 1. ``chunk_size`` is the number of k with one scale; the last
    chunk may be shorter. ``tile`` and ``programs_per_processor`` are for measurements.
    """
    batches, m, k = a_BMK.shape
    n = b_BNK.shape[1]
    num_chunks = a_scale_BMC.shape[2]
    # A wide tile of fp32 results does not fit shared memory beside the loads in flight.
    is_wide = num_chunks == 1 and out_BMN.element_size() == 2
    tile = tile or (SHORT_TILE if m <= SHORT_TILE["BLOCK_M"] else WIDE_TILE if is_wide else SQUARE_TILE)
    num_tiles = batches * triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"])
    num_programs = min(num_tiles, _num_processors(a_BMK.device) * programs_per_processor)
    if not num_tiles:
        return
    _scaled_int8_matmul_kernel[(num_programs,)](
        a_BMK,
        b_BNK,
        a_scale_BMC.contiguous(),
        a_scale_BMC if b_scale_NC is None else b_scale_NC,
        out_BMN,
        batches,
        m,
        n,
        k,
        num_chunks,
        chunk_size,
        a_BMK.stride(0),
        a_BMK.stride(1),
        b_BNK.stride(0),
        b_BNK.stride(1),
        *((0, 0) if b_scale_NC is None else b_scale_NC.stride()),
        out_BMN.stride(0),
        out_BMN.stride(1),
        ONE_CHUNK=num_chunks == 1,
        HAS_B_SCALE=b_scale_NC is not None,
        TILES_PER_STRIP=TILES_PER_STRIP,
        enable_fp_fusion=False,
        **tile,
    )


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def _as_bytes(codes, IS_FLOAT8: tl.constexpr):
    """Codes int8 as they are, or the bits of the e4m3 numbers of the same value, for |codes| with at most 4 bits.

    Bits are moved by hand: Triton 3.6 loses half of the numbers where one tile is converted to e4m3 twice (H200).
    """
    if not IS_FLOAT8:
        return codes
    magnitude = tl.abs(codes.to(tl.int32))
    # Exponent and three bits of mantissa of an fp32 number, with the exponent's bias of e4m3.
    bits = (magnitude.to(tl.float32).to(tl.int32, bitcast=True) >> 20) - ((127 - 7) << 3)
    return (tl.where(magnitude > 0, bits, 0) | tl.where(codes < 0, 0x80, 0)).to(tl.int8)


@triton.jit
def _k_major_codes_kernel(
    codes_ptr,
    rows_ptr,
    columns_ptr,
    num_rows,
    num_columns,
    padded_rows,
    stride,
    WRITE_ROWS: tl.constexpr,
    ROWS_FLOAT8: tl.constexpr,
    COLUMNS_FLOAT8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs_r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offs_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (offs_r < num_rows)[:, None] & (offs_c < num_columns)[None, :]
    codes = tl.load(codes_ptr + offs_r[:, None].to(tl.int64) * stride + offs_c[None, :], mask=mask, other=0)
    if WRITE_ROWS:
        row_ptrs = rows_ptr + offs_r[:, None].to(tl.int64) * num_columns + offs_c[None, :]
        tl.store(row_ptrs, _as_bytes(codes, ROWS_FLOAT8), mask=mask)
    column_ptrs = columns_ptr + offs_c[:, None].to(tl.int64) * padded_rows + offs_r[None, :]
    columns = tl.trans(_as_bytes(codes, COLUMNS_FLOAT8))
    tl.store(column_ptrs, columns, mask=(offs_c < num_columns)[:, None] & (offs_r < padded_rows)[None, :])


def k_major_codes(codes_RC: torch.Tensor, rows_RC: torch.Tensor | None, columns_CP: torch.Tensor) -> None:
    """Write int8 codes once more row by row (where wanted) and transposed, in the types of the outputs."""
    num_rows, num_columns = codes_RC.shape
    padded_rows = columns_CP.shape[1]
    grid = (triton.cdiv(num_columns, COPY_TILE), triton.cdiv(padded_rows, COPY_TILE))
    if not grid[0] * grid[1]:
        return
    _k_major_codes_kernel[grid](
        codes_RC,
        None if rows_RC is None else rows_RC.view(torch.int8),
        columns_CP.view(torch.int8),
        num_rows,
        num_columns,
        padded_rows,
        codes_RC.stride(0),
        WRITE_ROWS=rows_RC is not None,
        ROWS_FLOAT8=rows_RC is not None and rows_RC.dtype == torch.float8_e4m3fn,
        COLUMNS_FLOAT8=columns_CP.dtype == torch.float8_e4m3fn,
        BLOCK=COPY_TILE,
        num_warps=8,
    )


@triton.jit
def _transpose_codes_kernel(codes_ptr, columns_ptr, num_rows, num_columns, padded_rows, stride, BLOCK: tl.constexpr):
    offs_r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offs_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (offs_r < num_rows)[:, None] & (offs_c < num_columns)[None, :]
    codes = tl.load(codes_ptr + offs_r[:, None].to(tl.int64) * stride + offs_c[None, :], mask=mask, other=0)
    column_ptrs = columns_ptr + offs_c[:, None].to(tl.int64) * padded_rows + offs_r[None, :]
    tl.store(column_ptrs, tl.trans(codes), mask=(offs_c < num_columns)[:, None] & (offs_r < padded_rows)[None, :])


def transpose_codes(codes_RC: torch.Tensor, columns_CP: torch.Tensor) -> None:
    """Write int8 [R, C] transposed, padded with zeros."""
    num_rows, num_columns = codes_RC.shape
    padded_rows = columns_CP.shape[1]
    grid = (triton.cdiv(num_columns, COPY_TILE), triton.cdiv(padded_rows, COPY_TILE))
    if grid[0] * grid[1]:
        _transpose_codes_kernel[grid](
            codes_RC, columns_CP, num_rows, num_columns, padded_rows, codes_RC.stride(0), BLOCK=COPY_TILE, num_warps=8
        )


@triton.jit
def _finite_or_inf(x):
    """|x|, with NaN as Inf, which a maximum does not lose."""
    return tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf"))


@triton.jit
def _grad_absmax_kernel(
    dy_ptr,
    x_scale_ptr,
    w_scale_ptr,
    row_absmax_ptr,
    column_absmax_ptr,
    num_tokens,
    num_outputs,
    stride,
    tiles_per_block,
    num_blocks,
    GROUPS: tl.constexpr,
    HAS_W_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs_t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offs_o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_t = offs_t < num_tokens
    mask_o = offs_o < num_outputs
    dy_ptrs = dy_ptr + offs_t[:, None].to(tl.int64) * stride + offs_o[None, :]
    dy = tl.load(dy_ptrs, mask=mask_t[:, None] & mask_o[None, :], other=0.0).to(tl.float32)  # [BLOCK, BLOCK]
    rows = dy
    if HAS_W_SCALE:
        rows = dy * tl.load(w_scale_ptr + offs_o, mask=mask_o, other=0.0)[None, :]
    tl.atomic_max(row_absmax_ptr + offs_t, tl.max(_finite_or_inf(rows), axis=1), mask=mask_t, sem="relaxed")
    block = tl.program_id(1) // tiles_per_block
    for group in tl.static_range(GROUPS):
        columns = dy * tl.load(x_scale_ptr + offs_t * GROUPS + group, mask=mask_t, other=0.0)[:, None]
        column_ptrs = column_absmax_ptr + (group * num_outputs + offs_o) * num_blocks + block
        tl.atomic_max(column_ptrs, tl.max(_finite_or_inf(columns), axis=0), mask=mask_o, sem="relaxed")


@triton.jit
def _codes(x, absmax, LEVELS: tl.constexpr, DTYPE: tl.constexpr):
    """x * (LEVELS / absmax) rounded half to even to DTYPE; 0 where absmax is not finite."""
    finite = absmax < float("inf")
    y = tl.where(finite, x * tl.div_rn(tl.full(absmax.shape, LEVELS, tl.float32), absmax), 0.0)
    if DTYPE.is_int():
        # 1.5 * 2**23: the sum has no fraction bits left, so adding rounds half to even.
        y = (y + 12582912.0) - 12582912.0
    return y.to(DTYPE)


@triton.jit
def _scale(absmax, LEVELS: tl.constexpr):
    """absmax / LEVELS, NaN where absmax is not finite."""
    scale = tl.div_rn(absmax, tl.full(absmax.shape, LEVELS, tl.float32))
    return tl.where(absmax < float("inf"), scale, float("nan"))


@triton.jit
def _quantize_grad_kernel(
    dy_ptr,
    x_scale_ptr,
    w_scale_ptr,
    row_absmax_ptr,
    column_absmax_ptr,
    rows_ptr,
    row_scale_ptr,
    columns_ptr,
    column_scale_ptr,
    num_tokens,
    num_outputs,
    padded_tokens,
    stride,
    tiles_per_block,
    num_blocks,
    min_absmax,
    GROUPS: tl.constexpr,
    HAS_W_SCALE: tl.constexpr,
    ROW_LEVELS: tl.constexpr,
    COLUMN_LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid_o = tl.program_id(0)
    pid_t = tl.program_id(1)
    offs_t = pid_t * BLOCK + tl.arange(0, BLOCK)
    offs_o = pid_o * BLOCK + tl.arange(0, BLOCK)
    mask_t = offs_t < num_tokens
    mask_o = offs_o < num_outputs
    mask = mask_t[:, None] & mask_o[None, :]
    dy = tl.load(dy_ptr + offs_t[:, None].to(tl.int64) * stride + offs_o[None, :], mask=mask, other=0.0).to(tl.float32)
    rows = dy
    if HAS_W_SCALE:
        rows = dy * tl.load(w_scale_ptr + offs_o, mask=mask_o, other=0.0)[None, :]
    row_absmax = tl.maximum(tl.load(row_absmax_ptr + offs_t, mask=mask_t, other=0.0), min_absmax)
    row_codes = _codes(rows, row_absmax[:, None], ROW_LEVELS, rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + offs_t[:, None].to(tl.int64) * num_outputs + offs_o[None, :], row_codes, mask=mask)
    if pid_o == 0:
        tl.store(row_scale_ptr + offs_t, _scale(row_absmax, ROW_LEVELS), mask=mask_t)
    block = pid_t // tiles_per_block
    for group in tl.static_range(GROUPS):
        columns = dy * tl.load(x_scale_ptr + offs_t * GROUPS + group, mask=mask_t, other=0.0)[:, None]
        offs_scale = (group * num_outputs + offs_o) * num_blocks + block
        column_absmax = tl.maximum(tl.load(column_absmax_ptr + offs_scale, mask=mask_o, other=0.0), min_absmax)
        codes = tl.trans(_codes(columns, column_absmax[None, :], COLUMN_LEVELS, columns_ptr.dtype.element_ty))
        column_ptrs = (
            columns_ptr + (group * num_outputs + offs_o)[:, None].to(tl.int64) * padded_tokens + offs_t[None, :]
        )
        tl.store(column_ptrs, codes, mask=mask_o[:, None] & (offs_t < padded_tokens)[None, :])
        if pid_t % tiles_per_block == 0:
            tl.store(column_scale_ptr + offs_scale, _scale(column_absmax, COLUMN_LEVELS), mask=mask_o)


def quantize_grad(
    dy_TO: torch.Tensor,
    x_scale_TG: torch.Tensor,
    w_scale_O: torch.Tensor | None,
    block_tokens: int,
    min_absmax: float,
    levels: tuple[float, float],
    rows_TO: torch.Tensor,
    row_scale_T1: torch.Tensor,
    columns_GOP: torch.Tensor,
    column_scale_GOC: torch.Tensor,
) -> None:
    """Read dY twice (largest magnitudes, then codes) and write its codes by row and by column, with their scales.

    Scales of columns span all tokens or blocks of tokens, so no tile can know them on its own: hence two reads.
    ``block_tokens`` is a multiple of the tile, or reaches past the last token.
    """
    num_tokens, num_outputs = dy_TO.shape
    num_groups, _, num_blocks = column_scale_GOC.shape
    grid = (triton.cdiv(num_outputs, COPY_TILE), triton.cdiv(columns_GOP.shape[2], COPY_TILE))
    if not grid[0] * grid[1]:
        return
    absmax = dy_TO.new_zeros(num_tokens + column_scale_GOC.numel(), dtype=torch.float32)
    row_absmax, column_absmax = absmax[:num_tokens], absmax[num_tokens:]
    x_scale_TG = x_scale_TG.contiguous()
    shape = {"GROUPS": num_groups, "HAS_W_SCALE": w_scale_O is not None, "BLOCK": COPY_TILE, "num_warps": 8}
    tiles_per_block = triton.cdiv(block_tokens, COPY_TILE)
    _grad_absmax_kernel[grid](
        dy_TO,
        x_scale_TG,
        w_scale_O,
        row_absmax,
        column_absmax,
        num_tokens,
        num_outputs,
        dy_TO.stride(0),
        tiles_per_block,
        num_blocks,
        **shape,
    )
    _quantize_grad_kernel[grid](
        dy_TO,
        x_scale_TG,
        w_scale_O,
        row_absmax,
        column_absmax,
        rows_TO,
        row_scale_T1,
        columns_GOP,
        column_scale_GOC,
        num_tokens,
        num_outputs,
        columns_GOP.shape[2],
        dy_TO.stride(0),
        tiles_per_block,
        num_blocks,
        min_absmax,
        ROW_LEVELS=levels[0],
        COLUMN_LEVELS=levels[1],
        enable_fp_fusion=False,
        **shape,
    )
