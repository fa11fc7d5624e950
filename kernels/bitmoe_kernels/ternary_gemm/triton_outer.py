"""Triton kernel of weight gradients: columns of dY times those of activations, e4m3 or int8, of all rows or by expert.

What      README eq. 6 and 8. Each expert contracts its own range of the padded rows, whose length stays on the device.
Contract  codes of one type, transposed and padded with zeros; tensors contiguous; outputs are allocated by the caller.
Numerics  FP8 sums stay in the tensor cores (about 14 significant bits) and have a scale for each output. INT8 sums of a
          chunk are exact and have a scale for each output and chunk; chunks are added in fp32.
Tiling    One step of the INT8 product is a whole chunk, scaled without a branch, which would keep multiplications from
          overlapping: chunks of 512 in steps of 128 take 0.81 instead of 0.67 ms for 7B's down (H200).
Not here  columns (triton_columns.py, triton_grad_columns.py).
"""

# Shapes: M, N = columns of the two operands (outputs and inputs), P = padded rows, E = experts, C = chunks of P.

import torch
import triton
import triton.language as tl

from bitmoe_kernels.ternary_gemm.reference import CHUNK
from bitmoe_kernels.ternary_gemm.triton_tiles import (
    TILES_PER_STRIP,
    WIDE_TILE,
    num_programs,
    operand_tiles,
    place_in_strip,
    result_tiles,
)

_CHUNK_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": CHUNK, "num_warps": 8, "num_stages": 3}


def outer(
    a_MP: torch.Tensor,
    a_scale: torch.Tensor,
    b_NP: torch.Tensor,
    padded_ends_E: torch.Tensor | None,
    out_EMN: torch.Tensor,
    tile: dict | None = None,
) -> None:
    """Contract the padded rows of each expert, or of all (E = 1, no ends).

    ``a_scale`` is fp32 [E, M] for e4m3 codes, [C, M] for int8 ones. ``tile`` is for measurements and tests: its BLOCK_K
    divides the padding, and is a chunk for int8.
    """
    (num_experts, m, n), is_int8 = out_EMN.shape, a_MP.dtype == torch.int8
    tile = tile or (_CHUNK_TILE if is_int8 else WIDE_TILE)
    num_tiles = num_experts * triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"])
    if not num_tiles:
        return
    with torch.cuda.device_of(out_EMN):
        _outer_kernel[(num_programs(num_tiles, tile, out_EMN.device),)](
            *operand_tiles(a_MP, b_NP, tile, a_MP.shape[1]),
            result_tiles(out_EMN, tile),
            a_scale,
            out_EMN,
            padded_ends_E,
            num_experts,
            triton.cdiv(a_MP.shape[1], tile["BLOCK_K"]),
            m,
            n,
            IS_INT8=is_int8,
            TILES_PER_STRIP=TILES_PER_STRIP,
            **tile,
        )


# With one step the loop over steps would be none, and the one over tiles take its loads in flight.
@triton.jit(do_not_specialize=["num_steps"])
def _outer_kernel(
    a_tiles,
    b_tiles,
    out_tiles,
    a_scale_ptr,
    out_ptr,
    padded_ends_ptr,
    num_experts,
    num_steps,
    M,
    N,
    IS_INT8: tl.constexpr,
    TILES_PER_STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_experts * tiles_m * tiles_n, tl.num_programs(0)):
        expert = tile // (tiles_m * tiles_n)
        tile_m, tile_n = place_in_strip(tile % (tiles_m * tiles_n), tiles_m, tiles_n, TILES_PER_STRIP)
        first, end = 0, num_steps
        if padded_ends_ptr is not None:
            first = tl.load(padded_ends_ptr + expert - 1, mask=expert > 0, other=0) // BLOCK_K
            end = tl.load(padded_ends_ptr + expert) // BLOCK_K
        offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # Rows past the end have the last one's scale and are not stored.
        scale_ptrs = a_scale_ptr + tl.minimum(offs_m, M - 1)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(first, end):
            a = a_tiles.load([tile_m * BLOCK_M, step * BLOCK_K])
            b = b_tiles.load([tile_n * BLOCK_N, step * BLOCK_K])
            if IS_INT8:
                scale = tl.load(scale_ptrs + step * M)
                total += tl.dot(a, b.T, out_dtype=tl.int32).to(tl.float32) * scale[:, None]
            else:
                total = tl.dot(a, b.T, total)
        if not IS_INT8:
            total *= tl.load(scale_ptrs + expert * M)[:, None]
        result = total.to(out_ptr.dtype.element_ty)
        if out_tiles is None:
            out_ptrs = out_ptr + (expert.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
            tl.store(out_ptrs, result, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])
        else:
            out_tiles.store([expert * M + tile_m * BLOCK_M, tile_n * BLOCK_N], result)
