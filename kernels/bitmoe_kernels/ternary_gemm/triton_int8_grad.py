"""INT8 weight gradient in Triton: dY rounded by column and chunk of rows, and the product of transposed codes.

What      README eq. 7 and 8, of all rows or of each expert's; one read of dY, one write of its codes, transposed.
Contract  dY bf16, fp16 or fp32, scales fp32, codes int8; outputs are allocated by the caller. Rows past the last
          expert's are not read.
Numerics  codes and scales have the bits of reference.py. Sums of a chunk are exact; chunks are added in fp32.
Tiling    One step of the product is a whole chunk, scaled without a branch, which would keep multiplications from
          overlapping: chunks of 512 in steps of 128 take 0.81 instead of 0.67 ms for 7B's down (H200).
Not here  transposed codes of activations (triton_columns.py), which rows are whose, checks and dispatch (backward.py).
"""

# Shapes: R = rows, O = outputs, I = inputs, E = experts, P = padded rows, C = chunks of P.

import torch
import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import IS_INTERPRETED, ROUNDING, to_float32
from bitmoe_kernels.ternary_gemm.reference import CHUNK, INT8_STEP, MIN_ABSMAX
from bitmoe_kernels.ternary_gemm.triton_grad import largest_magnitude
from bitmoe_kernels.ternary_gemm.triton_tiles import (
    TILES_PER_STRIP,
    num_programs,
    operand_tiles,
    place_in_strip,
    result_tiles,
)

_MIN_ABSMAX = tl.constexpr(MIN_ABSMAX)
_STEP = tl.constexpr(INT8_STEP)
# 5 programs a processor: 0.215 instead of 0.227 ms with 4 (64 experts, H200).
_ROUNDED_TILE = {"BLOCK_ROWS": CHUNK, "BLOCK_FEATURES": 32, "num_warps": 4, "maxnreg": 96}
OUTER_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": CHUNK, "num_warps": 8, "num_stages": 3}


def quantize_columns(
    dy: torch.Tensor,
    x_scale_R1: torch.Tensor,
    columns_OP: torch.Tensor,
    scale_CO: torch.Tensor,
    tiles: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    source_R: torch.Tensor | None = None,
) -> None:
    """Write the int8 codes of dY times ``x_scale_R1``, transposed, and their scale for each chunk and output.

    ``tiles`` (a list of chunks: triton_row_tiles.py) says which rows are whose; without it P is R, rounded up.
    With ``source_R`` (int32) row r's gradient is the one at ``source_R[r]`` of ``dy``.
    """
    (num_outputs, num_columns), num_rows = columns_OP.shape, len(x_scale_R1)
    num_chunks = triton.cdiv(num_columns, CHUNK) if tiles is None else tiles[0].shape[1]
    with torch.cuda.device_of(dy):
        _quantize_columns_kernel[(triton.cdiv(num_outputs, _ROUNDED_TILE["BLOCK_FEATURES"]), num_chunks)](
            dy,
            source_R,
            x_scale_R1.contiguous(),
            columns_OP.view(torch.int32),
            scale_CO,
            *(tiles or (None, None, None)),
            num_chunks,
            num_rows,
            num_outputs,
            num_columns // 4,
            dy.stride(0),
            enable_fp_fusion=False,
            **_ROUNDED_TILE,
        )


@triton.jit
def _quantize_columns_kernel(
    dy_ptr,
    source_ptr,
    x_scale_ptr,
    columns_ptr,
    scale_ptr,
    table_ptr,
    count_ptr,
    padded_ends_ptr,
    max_tiles,
    num_rows,
    num_outputs,
    num_words,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    slot = tl.program_id(1)
    first, end, column, padded_end = slot * BLOCK_ROWS, num_rows, slot * BLOCK_ROWS, 4 * num_words
    if table_ptr is not None:
        if slot >= tl.load(count_ptr):
            return
        first, end = tl.load(table_ptr + max_tiles + slot), tl.load(table_ptr + 2 * max_tiles + slot)
        column = tl.load(table_ptr + 3 * max_tiles + slot)
        padded_end = tl.load(padded_ends_ptr + tl.load(table_ptr + slot))
    fours = tl.arange(0, BLOCK_ROWS // 4)
    features = tl.program_id(0) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    mask_features = features < num_outputs
    products, largest = (), tl.zeros([BLOCK_ROWS // 4, BLOCK_FEATURES], tl.float32)
    for i in tl.static_range(4):
        rows = first + 4 * fours + i
        is_row = rows < end
        sources = rows
        if source_ptr is not None:
            sources = tl.load(source_ptr + rows, mask=is_row, other=0)
        ptrs = dy_ptr + sources[:, None].to(tl.int64) * stride + features[None, :]
        dy = to_float32(tl.load(ptrs, mask=is_row[:, None] & mask_features[None, :], other=0.0))
        product = dy * tl.load(x_scale_ptr + rows, mask=is_row, other=0.0)[:, None]
        largest = tl.maximum(largest, tl.abs(product), propagate_nan=tl.PropagateNan.ALL)
        products = products + (product,)
    absmax = largest_magnitude(largest, 0)
    is_finite = absmax < float("inf")
    scale = tl.maximum(absmax, _MIN_ABSMAX) * _STEP
    reciprocal = tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), scale)[None, :]
    sums = ()
    for i in tl.static_range(4):
        # The code is in the lowest byte.
        sums = sums + ((products[i] * reciprocal + ROUNDING).to(tl.int32, bitcast=True),)
    words = tl.where(is_finite[None, :], _lowest_bytes(sums[0], sums[1], sums[2], sums[3]), 0)
    # Said in words, and that four of them are aligned, for stores of 16 bytes.
    offs_p = (tl.multiple_of(column // 4, 4) + fours)[None, :]
    mask = mask_features[:, None] & (offs_p < tl.multiple_of(padded_end // 4, 4))
    # What other rows read again (gradients of tokens) is not to make room for it in L2.
    columns_ptrs = columns_ptr + features[:, None].to(tl.int64) * num_words + offs_p
    tl.store(columns_ptrs, tl.trans(words), mask=mask, eviction_policy="evict_first")
    offs_scale = (column // BLOCK_ROWS).to(tl.int64) * num_outputs + features
    tl.store(scale_ptr + offs_scale, tl.where(is_finite, scale, float("nan")), mask=mask_features)


@triton.jit
def _lowest_bytes(a, b, c, d):
    """Words of the lowest bytes of four, in order."""
    if IS_INTERPRETED:
        return (a & 0xFF) | ((b & 0xFF) << 8) | ((c & 0xFF) << 16) | ((d & 0xFF) << 24)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 ab, cd;
            prmt.b32 ab, $1, $2, 0x0040;
            prmt.b32 cd, $3, $4, 0x0040;
            prmt.b32 $0, ab, cd, 0x5410;
            }""",
            "=r,r,r,r,r",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


def int8_outer(
    dy_columns_OP: torch.Tensor,
    scale_CO: torch.Tensor,
    x_columns_IP: torch.Tensor,
    padded_ends_E: torch.Tensor | None,
    out_EOI: torch.Tensor,
) -> None:
    """README eq. 8: contract the padded rows of each expert, or (no ``padded_ends_E``) all; all tensors contiguous."""
    num_experts, num_outputs, num_inputs = out_EOI.shape
    tile = OUTER_TILE
    num_tiles = num_experts * triton.cdiv(num_outputs, tile["BLOCK_M"]) * triton.cdiv(num_inputs, tile["BLOCK_N"])
    if not num_tiles:
        return
    with torch.cuda.device_of(out_EOI):
        _int8_outer_kernel[(num_programs(num_tiles, tile, out_EOI.device),)](
            *operand_tiles(dy_columns_OP, x_columns_IP, tile, dy_columns_OP.shape[1]),
            result_tiles(out_EOI, tile),
            scale_CO,
            out_EOI,
            padded_ends_E,
            num_experts,
            len(scale_CO),
            num_outputs,
            num_inputs,
            TILES_PER_STRIP=TILES_PER_STRIP,
            **tile,
        )


# With one chunk the loop over chunks would be none, and the one over tiles take its loads in flight.
@triton.jit(do_not_specialize=["num_chunks"])
def _int8_outer_kernel(
    a_tiles,
    b_tiles,
    out_tiles,
    a_scale_ptr,
    out_ptr,
    padded_ends_ptr,
    num_experts,
    num_chunks,
    M,
    N,
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
        first, end = 0, num_chunks
        if padded_ends_ptr is not None:
            first = tl.load(padded_ends_ptr + expert - 1, mask=expert > 0, other=0) // BLOCK_K
            end = tl.load(padded_ends_ptr + expert) // BLOCK_K
        offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # Rows past the end read the last one's scale and are not stored.
        scale_ptrs = a_scale_ptr + tl.minimum(offs_m, M - 1)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for chunk in range(first, end):
            a = a_tiles.load([tile_m * BLOCK_M, chunk * BLOCK_K])
            b = b_tiles.load([tile_n * BLOCK_N, chunk * BLOCK_K])
            scale = tl.load(scale_ptrs + chunk * M)
            total += tl.dot(a, b.T, out_dtype=tl.int32).to(tl.float32) * scale[:, None]
        result = total.to(out_ptr.dtype.element_ty)
        if out_tiles is None:
            out_ptrs = out_ptr + (expert.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
            tl.store(out_ptrs, result, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])
        else:
            out_tiles.store([expert * M + tile_m * BLOCK_M, tile_n * BLOCK_N], result)
