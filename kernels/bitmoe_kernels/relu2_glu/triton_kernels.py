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
    round_to,
    to_float32,
)
from bitmoe_kernels.act_quant.triton_pieces import (
    load_piece,
    piece_tile,
    rows_of_program,
    scales_of_pieces,
    store_codes,
    sums_of_pieces,
)
from bitmoe_kernels.norm_quant.triton_kernels import rstd_of_sums, times_gain


def few_pieces(num_features: int) -> dict[str, int]:
    """Launch constants of rows in pieces, 7 to 12 if they are long, of which a thread holds 4 elements each.

    1/7 of a row or less is padding; with 128 features a warp reduces its row without the others.
    """
    return piece_tile(num_features, narrowest=128, most_pieces=12, elements_per_thread=4)


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
        tile = few_pieces(num_features)
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
    rows = rows_of_program(num_rows, BLOCK_ROWS)
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
        rstd = rstd_of_sums(sums_of_pieces(squares), EPS, NUM_FEATURES)
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
    scale = scales_of_pieces(tiles, NUM_FEATURES, FORMAT, LEVELS)
    if weight_ptr is None:
        tl.store(scale_ptr + rows, scale)
    else:
        tl.store(scale_ptr + rows, scale * tl.load(weight_ptr + tokens).to(tl.float32))
    codes_ptrs = codes_ptr + (rows * NUM_FEATURES)[:, None]
    for piece in tl.static_range(NUM_PIECES):
        codes = finite_row_codes(tiles[piece], scale, FORMAT, False)
        store_codes(codes_ptrs, codes, scale == scale, piece, NUM_FEATURES, BLOCK_FEATURES)


@triton.jit
def relu_float32(x):
    """max(x, 0) in fp32; NaN stays NaN."""
    if x.dtype == tl.bfloat16 and not IS_INTERPRETED:
        asm: tl.constexpr = "{ .reg .b32 zero; mov.b32 zero, 0; max.NaN.bf16x2 $0, $1, zero; }"
        return to_float32(tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2))
    else:
        return tl.maximum(to_float32(x), 0.0, propagate_nan=tl.PropagateNan.ALL)
