"""Triton kernel of the INT8 product with its scales.

Contract  codes int8, scales fp32, last dimension contiguous; outputs are allocated by the caller.
Numerics  integer sums are exact; scales multiply in fp32 in the order of reference.py, without fused multiply-add, and
          are rounded once: the bits of the reference.
Tiling    8-bit tensor cores take both operands with the contracted dimension contiguous only (sm_90), hence the
          transposed copies (triton_columns.py). Tiles: triton_tiles.py.
Not here  FP8 products (torch._scaled_mm: float8_matmul.py), rounding of dY (triton_grad.py), checks (op.py).
"""

import torch
import triton
import triton.language as tl

from bitmoe_kernels.ternary_gemm.triton_tiles import (
    TILES_PER_STRIP,
    load_tile,
    num_programs,
    operand_tiles,
    place_in_strip,
    product_tile,
)

# Shapes: M, N = rows of the two operands, K = contracted, C = scale chunks along K.


@triton.jit
def scaled(sums, a_scale_ptrs, b_scale_ptrs):
    """Sums [M, N] as fp32 times a scale per row, then times a scale per column."""
    return sums.to(tl.float32) * tl.load(a_scale_ptrs)[:, None] * tl.load(b_scale_ptrs)[None, :]


@triton.jit
def _scaled_int8_matmul_kernel(
    a_ptr,
    b_ptr,
    a_scale_ptr,
    b_scale_ptr,
    out_ptr,
    a_tiles,
    b_tiles,
    M,
    N,
    K,
    num_chunks,
    chunk_size,
    a_stride,
    b_stride,
    b_scale_n_stride,
    b_scale_chunk_stride,
    out_stride,
    ONE_CHUNK: tl.constexpr,
    TILES_PER_STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    steps_per_chunk = tl.cdiv(chunk_size, BLOCK_K)
    offs_k = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=ONE_CHUNK):
        tile_m, tile_n = place_in_strip(tile, tiles_m, tiles_n, TILES_PER_STRIP)
        first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        offs_m = first_m + tl.arange(0, BLOCK_M)
        offs_n = first_n + tl.arange(0, BLOCK_N)
        # Rows past the end read row 0 and are not stored: no mask in the main loop for them.
        rows_m = tl.where(offs_m < M, offs_m, 0).to(tl.int64)
        rows_n = tl.where(offs_n < N, offs_n, 0).to(tl.int64)
        a_ptrs = a_ptr + rows_m[:, None] * a_stride + offs_k[None, :]
        b_ptrs = b_ptr + rows_n[None, :] * b_stride + offs_k[:, None]
        a_scale_ptrs = a_scale_ptr + rows_m * num_chunks
        b_scale_ptrs = b_scale_ptr + rows_n * b_scale_n_stride
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(num_chunks * steps_per_chunk):
            chunk = step // steps_per_chunk
            start = chunk * chunk_size
            k = (step - chunk * steps_per_chunk) * BLOCK_K
            if a_tiles is not None:
                a = load_tile(a_tiles, first_m, chunk, k, ONE_CHUNK, BLOCK_M, BLOCK_K)
                b = load_tile(b_tiles, first_n, chunk, k, ONE_CHUNK, BLOCK_N, BLOCK_K).T
            else:
                mask_k = offs_k < min(chunk_size, K - start) - k
                a = tl.load(a_ptrs + (start + k), mask=mask_k[None, :], other=0)  # [BLOCK_M, BLOCK_K]
                b = tl.load(b_ptrs + (start + k), mask=mask_k[:, None], other=0)  # [BLOCK_K, BLOCK_N]
            sums = tl.dot(a, b, sums, out_dtype=tl.int32)
            # One flat loop keeps the loads in flight from chunk to chunk.
            if not ONE_CHUNK and k + BLOCK_K >= chunk_size:
                total += scaled(sums, a_scale_ptrs + chunk, b_scale_ptrs + chunk * b_scale_chunk_stride)
                sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        if ONE_CHUNK:
            total = scaled(sums, a_scale_ptrs, b_scale_ptrs)
        out_ptrs = out_ptr + offs_m[:, None].to(tl.int64) * out_stride + offs_n[None, :]
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def scaled_int8_matmul(
    a_MK: torch.Tensor,
    a_scale_MC: torch.Tensor,
    b_NK: torch.Tensor,
    b_scale_NC: torch.Tensor,
    chunk_size: int,
    out_MN: torch.Tensor,
    tile: dict | None = None,
) -> None:
    """out[m, n] = sum over chunks c, in order, of (sum over k in c of a * b) * a_scale[m, c] * b_scale[n, c].

    ``b_scale_NC`` may be expanded (stride 0). ``chunk_size`` is the number of k with one scale; the last chunk may be
    shorter. ``tile`` is for measurements and tests.
    """
    (m, k), n = a_MK.shape, len(b_NK)
    num_chunks = a_scale_MC.shape[1]
    tile = tile or product_tile(a_MK, b_NK, out_MN, chunk_size, 1)
    num_tiles = triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"])
    if not num_tiles:
        return
    _scaled_int8_matmul_kernel[(num_programs(num_tiles, tile, a_MK.device),)](
        a_MK,
        b_NK,
        a_scale_MC.contiguous(),
        b_scale_NC,
        out_MN,
        *operand_tiles(a_MK, b_NK, tile, chunk_size),
        m,
        n,
        k,
        num_chunks,
        chunk_size,
        a_MK.stride(0),
        b_NK.stride(0),
        *b_scale_NC.stride(),
        out_MN.stride(0),
        ONE_CHUNK=num_chunks == 1,
        TILES_PER_STRIP=TILES_PER_STRIP,
        enable_fp_fusion=False,
        **tile,
    )
