"""Triton GEMM of routed experts, INT8 and FP8: the rows of each expert times its own matrix.

What      One persistent kernel for [R, K] x [E, N, K] (forward, dgrad), with the main loop of the dense kernel in
          ``ternary_gemm``. How many rows an expert has is read on the device (triton_row_tiles.py).
Contract  codes int8 or e4m3, last dimension contiguous; scales fp32; outputs are allocated by the caller. Rows past
          ``ends_E[-1]`` are neither read into results nor written.
Numerics  int8 has the bits of the reference. FP8 sums stay in the tensor cores (about 14 significant bits) for one
          chunk of k; chunks are added in fp32.
Not here  the wgrad (``ternary_gemm/triton_outer.py``), transposing (triton_codes.py), checks and dispatch (op.py,
          backward.py, float8_matmul.py).
"""

import torch
import triton
import triton.language as tl

from bitmoe_kernels.grouped_ternary_gemm.triton_row_tiles import row_tiles
from bitmoe_kernels.ternary_gemm.triton_kernels import scaled
from bitmoe_kernels.ternary_gemm.triton_tiles import (
    TILES_PER_STRIP,
    load_tile,
    num_programs,
    operand_tiles,
    place_in_strip,
    product_tile,
)

# Shapes: R = rows sorted by expert, E = experts, K = contracted, N = columns of a product, C = chunks of k.


@triton.jit
def _product(
    a_ptrs,
    b_ptrs,
    a_tiles,
    b_tiles,
    first_a,
    first_b,
    a_scale_ptrs,
    b_scale_ptrs,
    K,
    num_chunks,
    chunk_size,
    b_scale_chunk_stride,
    ONE_CHUNK: tl.constexpr,
    SCALE_CHUNKS: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile in fp32: chunks of k added in order, each scaled by itself (SCALE_CHUNKS) or all of them at the end."""
    offs_k = tl.arange(0, BLOCK_K)
    steps_per_chunk = tl.cdiv(chunk_size, BLOCK_K)
    full_chunks = num_chunks - 1
    num_steps = full_chunks * steps_per_chunk + tl.cdiv(K - full_chunks * chunk_size, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM_DTYPE)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(num_steps):
        chunk = step // steps_per_chunk
        start = chunk * chunk_size
        k = (step - chunk * steps_per_chunk) * BLOCK_K
        length = min(chunk_size, K - start)
        if a_tiles is not None:
            a = load_tile(a_tiles, first_a, chunk, k, ONE_CHUNK, BLOCK_M, BLOCK_K)
            b = load_tile(b_tiles, first_b, chunk, k, ONE_CHUNK, BLOCK_N, BLOCK_K).T
        else:
            mask_k = offs_k < length - k
            a = tl.load(a_ptrs + (start + k), mask=mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
            b = tl.load(b_ptrs + (start + k), mask=mask_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        sums = tl.dot(a, b, sums, out_dtype=SUM_DTYPE)
        # One flat loop keeps the loads in flight from chunk to chunk.
        if not ONE_CHUNK and k + BLOCK_K >= length:
            if SCALE_CHUNKS:
                total += scaled(sums, a_scale_ptrs + chunk, b_scale_ptrs + chunk * b_scale_chunk_stride)
            else:
                total += sums.to(tl.float32)
            sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM_DTYPE)
    if ONE_CHUNK:
        total = sums.to(tl.float32)
    if not SCALE_CHUNKS:
        total = scaled(total, a_scale_ptrs, b_scale_ptrs)
    return total


@triton.jit
def _grouped_matmul_kernel(
    a_ptr,
    b_ptr,
    a_scale_ptr,
    b_scale_ptr,
    out_ptr,
    a_tiles,
    b_tiles,
    table_ptr,
    count_ptr,
    max_tiles,
    N,
    K,
    num_chunks,
    chunk_size,
    num_scales,
    a_stride,
    b_expert_stride,
    b_stride,
    b_scale_expert_stride,
    b_scale_n_stride,
    b_scale_chunk_stride,
    out_stride,
    ONE_CHUNK: tl.constexpr,
    SCALE_CHUNKS: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    TILES_PER_STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.load(count_ptr)
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=ONE_CHUNK):
        slot, tile_n = place_in_strip(tile, tiles_m, tiles_n, TILES_PER_STRIP)
        expert = tl.load(table_ptr + slot)
        first_row = tl.load(table_ptr + max_tiles + slot)
        end_row = tl.load(table_ptr + 2 * max_tiles + slot)
        offs_m = first_row + tl.arange(0, BLOCK_M)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # Rows past the expert's end read its first one (of tiles, the next expert's) and are not stored: no mask in the
        # main loop for them.
        rows_m = tl.where(offs_m < end_row, offs_m, first_row)
        rows_n = tl.where(offs_n < N, offs_n, 0)
        total = _product(
            a_ptr + rows_m[:, None].to(tl.int64) * a_stride + offs_k[None, :],
            b_ptr + expert.to(tl.int64) * b_expert_stride + rows_n[None, :].to(tl.int64) * b_stride + offs_k[:, None],
            a_tiles,
            b_tiles,
            first_row,
            expert * N + tile_n * BLOCK_N,
            a_scale_ptr + rows_m * num_scales,
            b_scale_ptr + expert * b_scale_expert_stride + rows_n * b_scale_n_stride,
            K,
            num_chunks,
            chunk_size,
            b_scale_chunk_stride,
            ONE_CHUNK,
            SCALE_CHUNKS,
            SUM_DTYPE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        out_ptrs = out_ptr + offs_m[:, None].to(tl.int64) * out_stride + offs_n[None, :]
        mask = (offs_m < end_row)[:, None] & (offs_n < N)[None, :]
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


def grouped_matmul(
    a_RK: torch.Tensor,
    a_scale_RC: torch.Tensor,
    b_ENK: torch.Tensor,
    b_scale_ENC: torch.Tensor,
    ends_E: torch.Tensor,
    chunk_size: int,
    out_RN: torch.Tensor,
    tile: dict | None = None,
) -> None:
    """out[r, n] = sum over chunks c, in order, of (sum over k in c of a * b) * a_scale[r, c] * b_scale[e, n, c].

    ``b_scale_ENC`` may be expanded (stride 0). ``chunk_size`` is the number of k with one scale or, where there is one
    scale only, the number of k after which FP8 sums are promoted to fp32. ``tile`` is for measurements and tests.
    """
    (num_rows, k), num_scales = a_RK.shape, a_scale_RC.shape[1]
    num_experts, n, _ = b_ENK.shape
    num_chunks = triton.cdiv(k, chunk_size)
    b_rows = b_ENK.flatten(0, 1)
    tile = tile or product_tile(a_RK, b_rows, out_RN, chunk_size, num_experts)
    if not num_rows * n:
        return
    tiles = row_tiles(ends_E, num_rows, tile["BLOCK_M"])
    max_tiles = tiles.table_4S.shape[1]
    num_tiles = max_tiles * triton.cdiv(n, tile["BLOCK_N"])
    _grouped_matmul_kernel[(num_programs(num_tiles, tile, a_RK.device),)](
        a_RK,
        b_ENK,
        a_scale_RC.contiguous(),
        b_scale_ENC,
        out_RN,
        *operand_tiles(a_RK, b_rows, tile, chunk_size),
        tiles.table_4S,
        tiles.count_1,
        max_tiles,
        n,
        k,
        num_chunks,
        chunk_size,
        num_scales,
        a_RK.stride(0),
        b_ENK.stride(0),
        b_ENK.stride(1),
        *b_scale_ENC.stride(),
        out_RN.stride(0),
        ONE_CHUNK=num_chunks == 1,
        SCALE_CHUNKS=num_scales > 1,
        SUM_DTYPE=tl.int32 if a_RK.dtype == torch.int8 else tl.float32,
        TILES_PER_STRIP=TILES_PER_STRIP,
        enable_fp_fusion=False,
        **tile,
    )
