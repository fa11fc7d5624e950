"""dY rounded to INT8 by column and chunk of rows in Triton, for the weight gradient of INT8 activations.

What      README eq. 7, of all rows or of each expert's: one read of dY, one write of its codes, transposed.
Contract  dY bf16, fp16 or fp32, scales fp32, codes int8; outputs are allocated by the caller. Rows past the last
          expert's are not read.
Numerics  the bits of reference.py.
Not here  the product (triton_outer.py), which rows are whose, checks and dispatch (backward.py).
"""

# Shapes: R = rows, O = outputs, P = padded rows, C = chunks of P.

import torch
import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import IS_INTERPRETED, ROUNDING, to_float32
from bitmoe_kernels.ternary_gemm.reference import CHUNK, INT8_STEP, MIN_ABSMAX
from bitmoe_kernels.ternary_gemm.triton_grad import largest_magnitude

_MIN_ABSMAX = tl.constexpr(MIN_ABSMAX)
_STEP = tl.constexpr(INT8_STEP)
# 5 programs a processor: 0.215 instead of 0.227 ms with 4 (64 experts, H200).
_ROUNDED_TILE = {"BLOCK_ROWS": CHUNK, "BLOCK_FEATURES": 32, "num_warps": 4, "maxnreg": 96}


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
        # Loaded before the check, to overlap with it: the table has memory for every slot.
        expert, first = tl.load(table_ptr + slot), tl.load(table_ptr + max_tiles + slot)
        end, column = tl.load(table_ptr + 2 * max_tiles + slot), tl.load(table_ptr + 3 * max_tiles + slot)
        if slot >= tl.load(count_ptr):
            return
        padded_end = tl.load(padded_ends_ptr + expert)
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
