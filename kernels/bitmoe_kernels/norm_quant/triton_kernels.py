"""RMSNorm or sub-norm, quantization and top-K in one read of x and one write of codes; and the norms' backward.

What      README eq. 1-7. Codes, scale, rstd and y equal reference.py bit for bit: the forward takes its operations one
          by one. The backward pass computes in fp32 and rounds dx once.
Contract  bf16, fp16 or fp32 tensors, mixed as they come; any sizes; inputs are made contiguous.
Tiling    whole rows (groups) in registers, cut into pieces (triton_pieces.py) but for the search of top-K: 3 bytes an
          element for bf16. Backward, a program stays with its group of features and takes tiles of tokens one after the
          other, adding its share of dgain in registers; torch adds the shares, in an order that does not change.
Not here  fp64 input, argument checks and dispatch (op.py).
"""

# Shapes: T = tokens, D = features, G = groups of d = D / G features, R = T * G rows of a tile's view [R, d],
#         P = programs of a group.

import torch
import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import (
    FORMAT_LEVELS,
    IS_INTERPRETED,
    finite_row_codes,
    held_to,
    neighbour_square_sums,
    round_to,
    row_means,
    row_tile,
    to_float32,
)
from bitmoe_kernels.act_quant.triton_pieces import (
    load_piece,
    piece_tile,
    rows_of_program,
    scales_of_pieces,
    store_codes,
    store_piece,
    sums_of_pieces,
)
from bitmoe_kernels.sparsify.triton_kernels import ELEMENTS_PER_THREAD as TOPK_ELEMENTS_PER_THREAD
from bitmoe_kernels.sparsify.triton_kernels import topk_rows

_MOST_FEATURES_IN_8_A_PIECE = 4096
# The backward pass keeps sums of dgain beside the tile: 16 warps of 128 registers a thread fill a processor.
_BACKWARD_ELEMENTS_PER_THREAD = 32
_BACKWARD_REGISTERS = 128
_WARPS_PER_PROCESSOR = 16


def norm_quantize_triton(
    x_TD: torch.Tensor,
    gain_D: torch.Tensor,
    eps: float,
    num_format: str,
    is_sub_norm: bool = False,
    groups: int = 1,
    keep: float = 1.0,
    code_dtype: torch.dtype = torch.int8,
    with_normalized: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Codes [..., D], scale and rstd fp32 [..., groups], and y if wanted; eq. 3 if ``is_sub_norm``, else eq. 2."""
    x_TD = x_TD.contiguous()
    codes_TD = torch.empty_like(x_TD, dtype=torch.int8)
    y_TD = torch.empty_like(x_TD) if with_normalized else None
    scale_TG = torch.empty(*x_TD.shape[:-1], groups, dtype=torch.float32, device=x_TD.device)
    rstd_TG = torch.empty_like(scale_TG)
    if num_rows := scale_TG.numel():
        num_features = x_TD.shape[-1] // groups
        tile = _one_piece_tile(num_features) if keep < 1 else _pieces(num_features)
        with torch.cuda.device_of(x_TD):
            _norm_quant_fwd_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
                x_TD,
                gain_D.contiguous(),
                codes_TD,
                scale_TG,
                rstd_TG,
                y_TD,
                num_rows,
                round(keep * num_features),
                eps,
                num_features,
                groups,
                is_sub_norm,
                keep < 1,
                num_format,
                FORMAT_LEVELS[num_format],
                code_dtype == torch.float8_e4m3fn,
                enable_fp_fusion=False,
                **tile,
            )
    result = codes_TD.view(code_dtype), scale_TG, rstd_TG
    return (*result, y_TD) if with_normalized else result


def rms_norm_triton(x_TD: torch.Tensor, gain_D: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Equations 1 and 2: y [..., D] in the dtype of x, rstd fp32 [..., 1]."""
    x_TD = x_TD.contiguous()
    y_TD = torch.empty_like(x_TD)
    rstd_T1 = torch.empty(*x_TD.shape[:-1], 1, dtype=torch.float32, device=x_TD.device)
    if num_rows := rstd_T1.numel():
        tile = _pieces(x_TD.shape[-1])
        with torch.cuda.device_of(x_TD):
            _rms_norm_fwd_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
                x_TD,
                gain_D.contiguous(),
                y_TD,
                rstd_T1,
                num_rows,
                eps,
                x_TD.shape[-1],
                enable_fp_fusion=False,
                **tile,
            )
    return y_TD, rstd_T1


def norm_backward_triton(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    gain_D: torch.Tensor,
    rstd_TG: torch.Tensor,
    residual_grad_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx [..., D] in the dtype of x and dgain fp32 [D]; ``residual_grad_TD`` is added to dx before it is rounded."""
    x_TD = x_TD.contiguous()
    dx_TD = torch.empty_like(x_TD)
    groups = rstd_TG.shape[-1]
    num_tokens, num_features = rstd_TG.numel() // groups, x_TD.shape[-1] // groups
    if not num_tokens:
        return dx_TD, torch.zeros(x_TD.shape[-1], dtype=torch.float32, device=x_TD.device)
    tile = row_tile(max(2, num_features), _BACKWARD_ELEMENTS_PER_THREAD)
    programs = _num_programs(x_TD.device, num_tokens, groups, tile)
    dgain_PD = torch.empty(programs // groups, x_TD.shape[-1], dtype=torch.float32, device=x_TD.device)
    with torch.cuda.device_of(x_TD):
        _norm_bwd_kernel[(programs,)](
            dy_TD.contiguous(),
            x_TD,
            gain_D.contiguous(),
            rstd_TG.contiguous(),
            None if residual_grad_TD is None else residual_grad_TD.contiguous(),
            dx_TD,
            dgain_PD,
            num_tokens,
            num_features,
            groups,
            **held_to(_BACKWARD_REGISTERS, tile),
        )
    return dx_TD, dgain_PD.sum(0)


def _pieces(num_features: int) -> dict[str, int]:
    """Launch constants of rows in pieces: 64 elements a thread up to 4,096 features, 88 at most of longer rows.

    8,192 rows, RMSNorm + INT4: 2,048 features in 4 pieces 16.2 us, in 8 pieces 16.8; 5,504 features in 11 pieces 39.6,
    in 6 pieces 43.3; 11,008 features in 22 pieces 74.7, in 11 pieces of twice the warps 80.5 (H200).
    """
    elements_per_thread = 8 if num_features <= _MOST_FEATURES_IN_8_A_PIECE else 4
    return piece_tile(num_features, narrowest=512, most_pieces=22, elements_per_thread=elements_per_thread)


def _one_piece_tile(num_features: int) -> dict[str, int]:
    """Launch constants of rows in one piece, with the registers that the search for the largest needs."""
    # Not one feature: bf16 numbers are converted in pairs.
    return {"NUM_PIECES": 1, **row_tile(max(2, num_features), TOPK_ELEMENTS_PER_THREAD)}


def _num_programs(device: torch.device, num_tokens: int, groups: int, tile: dict[str, int]) -> int:
    """Programs that fill the GPU once, a multiple of ``groups``; no more than there are tiles."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    programs = processors * max(1, _WARPS_PER_PROCESSOR // tile["num_warps"])
    return groups * min(triton.cdiv(num_tokens, tile["BLOCK_ROWS"]), triton.cdiv(programs, groups))


@triton.jit
def _norm_quant_fwd_kernel(
    x_ptr,
    gain_ptr,
    codes_ptr,
    scale_ptr,
    rstd_ptr,
    y_ptr,
    num_rows,
    num_kept,
    EPS: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    IS_SUB_NORM: tl.constexpr,
    IS_SPARSE: tl.constexpr,
    FORMAT: tl.constexpr,
    LEVELS: tl.constexpr,
    IS_FLOAT8: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    rows = rows_of_program(num_rows, BLOCK_ROWS)
    offs_rows = (rows * NUM_FEATURES)[:, None]
    rstd, pieces = _normalized_pieces(
        x_ptr + offs_rows,
        _gain_ptrs(gain_ptr, rows, NUM_FEATURES, NUM_GROUPS),
        EPS,
        IS_SUB_NORM,
        NUM_FEATURES,
        NUM_PIECES,
        BLOCK_FEATURES,
    )
    tl.store(rstd_ptr + rows, rstd)
    scale = scales_of_pieces(pieces, NUM_FEATURES, FORMAT, LEVELS)
    tl.store(scale_ptr + rows, scale)
    for piece in tl.static_range(NUM_PIECES):
        y = pieces[piece]
        if y_ptr is not None:
            store_piece(y_ptr + offs_rows, y, piece, NUM_FEATURES, BLOCK_FEATURES)
        codes = finite_row_codes(y, scale, FORMAT, IS_FLOAT8)
        if IS_SPARSE:
            codes = tl.where(_is_kept(y, num_kept, NUM_FEATURES), codes, 0)
        store_codes(codes_ptr + offs_rows, codes, scale == scale, piece, NUM_FEATURES, BLOCK_FEATURES)


@triton.jit
def _is_kept(y, num_kept, NUM_FEATURES: tl.constexpr):
    """Which of whole rows [BR, BF] are among the ``num_kept`` largest magnitudes."""
    if y.dtype == tl.float32:
        return topk_rows(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, num_kept, NUM_FEATURES, 31)
    else:
        return topk_rows(y.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, num_kept, NUM_FEATURES, 15)


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,
    gain_ptr,
    y_ptr,
    rstd_ptr,
    num_rows,
    EPS: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    rows = rows_of_program(num_rows, BLOCK_ROWS)
    offs_rows = (rows * NUM_FEATURES)[:, None]
    gain_ptrs = _gain_ptrs(gain_ptr, rows, NUM_FEATURES, 1)
    rstd, pieces = _normalized_pieces(
        x_ptr + offs_rows, gain_ptrs, EPS, False, NUM_FEATURES, NUM_PIECES, BLOCK_FEATURES
    )
    tl.store(rstd_ptr + rows, rstd)
    for piece in tl.static_range(NUM_PIECES):
        store_piece(y_ptr + offs_rows, pieces[piece], piece, NUM_FEATURES, BLOCK_FEATURES)


@triton.jit
def _gain_ptrs(gain_ptr, rows, NUM_FEATURES: tl.constexpr, NUM_GROUPS: tl.constexpr):
    """Where the gains of rows begin, [BR, 1], or [1, 1] where all rows have the same."""
    if NUM_GROUPS == 1:
        return gain_ptr + tl.zeros([1, 1], tl.int32)
    else:
        return gain_ptr + ((rows % NUM_GROUPS) * NUM_FEATURES)[:, None]


@triton.jit
def _normalized_pieces(
    x_ptrs,
    gain_ptrs,
    EPS: tl.constexpr,
    IS_SUB_NORM: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """Equation 1, fp32 [BR], and equation 2 or 3: pieces [BR, BF] in the dtype of x."""
    pieces, squares = (), ()
    for piece in tl.static_range(NUM_PIECES):
        pieces = pieces + (load_piece(x_ptrs, piece, NUM_FEATURES, BLOCK_FEATURES),)
    for piece in tl.static_range(NUM_PIECES):
        squares = squares + (neighbour_square_sums(pieces[piece]),)
    rstd = rstd_of_sums(sums_of_pieces(squares), EPS, NUM_FEATURES)
    normalized = ()
    for piece in tl.static_range(NUM_PIECES):
        gain = load_piece(gain_ptrs, piece, NUM_FEATURES, BLOCK_FEATURES)
        normalized = normalized + (_normalized(pieces[piece], rstd, gain, IS_SUB_NORM),)
    return rstd, normalized


@triton.jit
def rstd_of_sums(sums, EPS: tl.constexpr, NUM_FEATURES: tl.constexpr):
    """Equation 1 of sums of squares, fp64 [BR]: fp32 [BR]."""
    mean_square = row_means(sums, NUM_FEATURES) + tl.full(sums.shape, EPS, tl.float64)
    # Newton's iteration doubles the 22 bits of the approximation twice.
    rstd = tl.rsqrt(mean_square.to(tl.float32)).to(tl.float64)
    for _ in tl.static_range(2):
        rstd = rstd * (1.5 - (0.5 * mean_square) * (rstd * rstd))
    # Rows of zeros, denormals or Inf.
    is_extreme = (mean_square < 2.0**-100) | (mean_square > 2.0**100)
    if tl.max(is_extreme.to(tl.int32), axis=0) > 0:
        rstd = 1.0 / tl.sqrt(mean_square)
    return rstd.to(tl.float32)


@triton.jit
def _normalized(x, rstd, gain, IS_SUB_NORM: tl.constexpr):
    """Equation 2 or 3: [BR, BF] in the dtype of x."""
    unit = to_float32(x) * rstd[:, None]
    if IS_SUB_NORM:
        return times_gain(round_to(unit, x.dtype), gain)
    else:
        return round_to(unit * to_float32(gain), x.dtype)


@triton.jit
def times_gain(unit, gain):
    """The last product of equation 3, rounded to the dtype of ``unit``."""
    if unit.dtype == tl.bfloat16 and gain.dtype == tl.bfloat16 and not IS_INTERPRETED:
        # The same bits as by way of fp32: half an instruction instead of 3.5.
        return tl.inline_asm_elementwise(
            "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [unit, gain], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return round_to(to_float32(unit) * to_float32(gain), unit.dtype)


@triton.jit
def _tile_of_group(
    block,
    num_tokens,
    NUM_FEATURES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BF: tl.constexpr,
):
    """Rows (of one group's features) [BR] of a block of tokens, whether they exist, their elements' offsets and mask.

    Program p takes the group p % G of the blocks p // G, p // G + programs / G, and so on.
    """
    tokens = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    rows = tokens * NUM_GROUPS + tl.program_id(0) % NUM_GROUPS
    features = tl.arange(0, BF)
    mask = (tokens < num_tokens)[:, None] & (features < NUM_FEATURES)[None, :]
    return rows, tokens < num_tokens, rows[:, None] * NUM_FEATURES + features[None, :], mask


@triton.jit
def _gain_of_group(gain_ptr, NUM_FEATURES: tl.constexpr, NUM_GROUPS: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    """The gain [1, BF] of this program's group, in its own dtype."""
    features = tl.arange(0, BLOCK_FEATURES)
    offs = (tl.program_id(0) % NUM_GROUPS) * NUM_FEATURES + features
    return tl.load(gain_ptr + offs, mask=features < NUM_FEATURES, other=0.0)[None, :]


@triton.jit
def _norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    gain_ptr,
    rstd_ptr,
    residual_grad_ptr,
    dx_ptr,
    dgain_ptr,
    num_tokens,
    NUM_FEATURES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    gain = _gain_of_group(gain_ptr, NUM_FEATURES, NUM_GROUPS, BLOCK_FEATURES)
    dgain = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.float32)
    program = tl.program_id(0) // NUM_GROUPS
    for block in range(program, tl.cdiv(num_tokens, BLOCK_ROWS), tl.num_programs(0) // NUM_GROUPS):
        rows, mask_rows, offs, mask = _tile_of_group(
            block, num_tokens, NUM_FEATURES, NUM_GROUPS, BLOCK_ROWS, BLOCK_FEATURES
        )
        x = tl.load(x_ptr + offs, mask=mask, other=0.0)
        dy = to_float32(tl.load(dy_ptr + offs, mask=mask, other=0.0))
        rstd = tl.load(rstd_ptr + rows, mask=mask_rows, other=0.0)[:, None]
        unit = to_float32(x) * rstd
        dgain += dy * unit
        dunit = dy * to_float32(gain)
        dot = tl.sum(dunit * unit, axis=1)[:, None] * (1.0 / NUM_FEATURES)
        dx = rstd * (dunit - unit * dot)
        if residual_grad_ptr is not None:
            dx += to_float32(tl.load(residual_grad_ptr + offs, mask=mask, other=0.0))
        tl.store(dx_ptr + offs, round_to(dx, dx_ptr.dtype.element_ty), mask=mask)
    features = tl.arange(0, BLOCK_FEATURES)
    offs = program * NUM_GROUPS * NUM_FEATURES + (tl.program_id(0) % NUM_GROUPS) * NUM_FEATURES + features
    tl.store(dgain_ptr + offs, tl.sum(dgain, axis=0), mask=features < NUM_FEATURES)
