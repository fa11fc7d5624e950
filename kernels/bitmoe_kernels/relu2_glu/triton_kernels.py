"""ReLU2-GLU, sub-norm and quantization in one read of gate_up and one write of codes.

What      README eq. 1-6. Codes, scale and rstd equal reference.py bit for bit: its operations, one by one.
Contract  gate_up and gain in bf16, fp16 or fp32; any sizes; tensors are made contiguous; rows sorted by expert.
Tiling    a row (group) is cut into pieces of one size, of which a thread holds 4 elements each: 11008 features are 11
          pieces of 1024, where a power of two would pad a row by half. The row length is a constant of the compiled
          kernel: loads are as wide as its divisors allow and only the last piece is masked.
Not here  the backward (triton_backward.py), fp64 input, argument checks and dispatch (op.py).
"""

# Shapes: T = tokens, F = features, G = groups of d = F / G features, E = experts, R = T * G rows of d features,
# BR, P = rows and features of a piece.

import torch
import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import (
    FORMAT_LEVELS,
    IS_INTERPRETED,
    finite_row_codes,
    neighbour_square_sums,
    neighbour_sums,
    round_to,
    row_means,
    row_scales,
    scales_of,
    to_float32,
)
from bitmoe_kernels.norm_quant.triton_kernels import rstd_of_sums, times_gain


def piece_tile(num_features: int) -> dict[str, int]:
    """Launch constants for rows of ``num_features``: 4 elements of a piece a thread, 7 to 12 pieces if they are long.

    Pieces are a power of two, but 128 (one warp) or more; 1/7 of a row or less is padding. Narrow pieces take several
    rows, so that a program has 4 warps; with 128 features a warp reduces its row without the others.
    """
    # Not one feature: squares are added in pairs.
    widest = max(2, triton.next_power_of_2(num_features))
    block_features = min(widest, max(128, triton.next_power_of_2(triton.cdiv(num_features, 12))))
    block_rows = max(1, 512 // block_features)
    return {
        "NUM_PIECES": triton.cdiv(num_features, block_features),
        "BLOCK_ROWS": block_rows,
        "BLOCK_FEATURES": block_features,
        "num_warps": block_rows * block_features // 128,
    }


def relu2_glu_quantize_triton(
    gate_up_T2F: torch.Tensor,
    gain: torch.Tensor | None,
    eps: float,
    num_format: str,
    groups: int,
    expert_R: torch.Tensor | None,
    weight_T1: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes int8 [..., F], scale and rstd fp32 [..., groups]; rstd is None without a gain."""
    gate_up_T2F = gate_up_T2F.contiguous()
    *lead, num_columns = gate_up_T2F.shape
    codes_TF = torch.empty(*lead, num_columns // 2, dtype=torch.int8, device=gate_up_T2F.device)
    scale_TG = torch.empty(*lead, groups, dtype=torch.float32, device=gate_up_T2F.device)
    rstd_TG = None if gain is None else torch.empty_like(scale_TG)
    if num_rows := scale_TG.numel():
        num_features = num_columns // 2 // groups
        tile = piece_tile(num_features)
        with torch.cuda.device_of(gate_up_T2F):
            _relu2_glu_fwd_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
                gate_up_T2F,
                None if gain is None else gain.contiguous(),
                None if expert_R is None else expert_R.contiguous(),
                None if weight_T1 is None else weight_T1.contiguous(),
                codes_TF,
                scale_TG,
                rstd_TG,
                num_rows,
                eps,
                num_features,
                groups,
                gain is not None,
                expert_R is not None,
                num_format,
                FORMAT_LEVELS[num_format],
                enable_fp_fusion=False,
                **tile,
            )
    return codes_TF, scale_TG, rstd_TG


@triton.jit
def _relu2_glu_fwd_kernel(
    gate_up_ptr,
    gain_ptr,
    expert_ptr,
    weight_ptr,
    codes_ptr,
    scale_ptr,
    rstd_ptr,
    num_rows,
    EPS: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
    FORMAT: tl.constexpr,
    LEVELS: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    SIZE: tl.constexpr = NUM_FEATURES * NUM_GROUPS
    # Rows past the end repeat the last one, and write what it writes.
    rows = tl.minimum(tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), num_rows - 1)
    tokens = rows // NUM_GROUPS
    offs_group = (rows % NUM_GROUPS) * NUM_FEATURES
    gate_ptrs = gate_up_ptr + (tokens * (2 * SIZE) + offs_group)[:, None]
    tiles = ()
    for piece in tl.static_range(NUM_PIECES):
        gate = load_piece(gate_ptrs, piece, NUM_FEATURES, BLOCK_FEATURES)
        up = load_piece(gate_ptrs + SIZE, piece, NUM_FEATURES, BLOCK_FEATURES)
        relu = relu_float32(gate)
        tiles = tiles + (round_to(relu * relu * to_float32(up), gate.dtype),)
    if HAS_NORM:
        squares = ()
        for piece in tl.static_range(NUM_PIECES):
            squares = squares + (neighbour_square_sums(tiles[piece]),)
        rstd = rstd_of_sums(_row_sums(squares), EPS, NUM_FEATURES)
        tl.store(rstd_ptr + rows, rstd)
        offs_gain = offs_group
        if HAS_EXPERTS:
            offs_gain += tl.load(expert_ptr + tokens).to(tl.int64) * SIZE
        normed = ()
        for piece in tl.static_range(NUM_PIECES):
            gain = load_piece(gain_ptr + offs_gain[:, None], piece, NUM_FEATURES, BLOCK_FEATURES)
            unit = round_to(to_float32(tiles[piece]) * rstd[:, None], gate_up_ptr.dtype.element_ty)
            normed = normed + (times_gain(unit, gain),)
        tiles = normed
    if FORMAT == "int4":
        sizes = ()
        for piece in tl.static_range(NUM_PIECES):
            sizes = sizes + (neighbour_sums(tl.abs(to_float32(tiles[piece]))),)
        scale = scales_of(row_means(_row_sums(sizes), NUM_FEATURES).to(tl.float32), LEVELS)
    else:
        magnitude = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], gate_up_ptr.dtype.element_ty)
        for piece in tl.static_range(NUM_PIECES):
            magnitude = larger_magnitude(magnitude, tiles[piece])
        scale = row_scales(magnitude, NUM_FEATURES, FORMAT, LEVELS)
    if weight_ptr is None:
        tl.store(scale_ptr + rows, scale)
    else:
        tl.store(scale_ptr + rows, scale * tl.load(weight_ptr + tokens).to(tl.float32))
    codes_ptrs = codes_ptr + (rows * NUM_FEATURES)[:, None]
    for piece in tl.static_range(NUM_PIECES):
        codes = finite_row_codes(tiles[piece], scale, FORMAT, False)
        store_codes(codes_ptrs, codes, scale == scale, piece, NUM_FEATURES, BLOCK_FEATURES)


@triton.jit
def _row_sums(pieces):
    """Sums [BR] of all pieces [BR, ...] of a row."""
    # Not added to zeros: these would have another layout, and every piece would pass through shared memory.
    total = pieces[0]
    for piece in tl.static_range(1, len(pieces)):
        total += pieces[piece]
    return tl.sum(total, axis=1)


@triton.jit
def relu_float32(x):
    """max(x, 0) in fp32; NaN stays NaN."""
    if x.dtype == tl.bfloat16 and not IS_INTERPRETED:
        asm: tl.constexpr = "{ .reg .b32 zero; mov.b32 zero, 0; max.NaN.bf16x2 $0, $1, zero; }"
        return to_float32(tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2))
    else:
        return tl.maximum(to_float32(x), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger_magnitude(largest, x):
    """The larger of ``largest``, which is not negative, and |x|; NaN where either is."""
    if x.dtype == tl.bfloat16 and not IS_INTERPRETED:
        asm: tl.constexpr = "{ .reg .b32 size; abs.bf16x2 size, $2; max.NaN.bf16x2 $0, $1, size; }"
        return tl.inline_asm_elementwise(asm, "=r,r,r", [largest, x], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        size = tl.maximum(to_float32(largest), tl.abs(to_float32(x)), propagate_nan=tl.PropagateNan.ALL)
        return round_to(size, x.dtype)


@triton.jit
def load_piece(row_ptrs, piece: tl.constexpr, NUM_FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    """Features of a piece [BR, P] of the rows that begin at ``row_ptrs`` [BR, 1]; 0 past their end."""
    features = piece * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)[None, :]
    if (piece + 1) * BLOCK_FEATURES <= NUM_FEATURES:
        return tl.load(row_ptrs + features)
    else:
        return tl.load(row_ptrs + features, mask=features < NUM_FEATURES, other=0.0)


@triton.jit
def load_piece_again(row_ptrs, piece: tl.constexpr, NUM_FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    """The same from the caches: of two reads alike the compiler makes one, and keeps the piece in registers."""
    features = piece * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)[None, :]
    mask = features < NUM_FEATURES
    return tl.load(row_ptrs + features, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def store_piece(row_ptrs, x, piece: tl.constexpr, NUM_FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    """Write ``x`` [BR, P] where :func:`load_piece` would read it."""
    features = piece * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)[None, :]
    if (piece + 1) * BLOCK_FEATURES <= NUM_FEATURES:
        tl.store(row_ptrs + features, x)
    else:
        tl.store(row_ptrs + features, x, mask=features < NUM_FEATURES)


@triton.jit
def store_codes(
    row_ptrs, codes, is_finite, piece: tl.constexpr, NUM_FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr
):
    """The same of codes [BR, P], and of 0 in rows that are not finite, bool [BR]."""
    features = piece * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)[None, :]
    mask, is_finite = features < NUM_FEATURES, is_finite[:, None]
    # A choice for each code would take four packed ones apart.
    tl.store(row_ptrs + features, codes, mask=mask & is_finite)
    tl.store(row_ptrs + features, tl.zeros_like(codes), mask=mask & ~is_finite)
