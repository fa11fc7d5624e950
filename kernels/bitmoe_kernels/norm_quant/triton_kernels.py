"""RMSNorm or sub-norm, quantization and top-K in one read of x and one write of codes.

What      README eq. 1-5. Codes, scale and rstd equal reference.py bit for bit: sums are fp64 and rounded once, every
          other step is the correctly rounded operation of the reference.
Contract  bf16, fp16 or fp32 x, gain of any of these; any sizes; x is made contiguous.
Tiling    whole rows (groups) in registers, as in act_quant: 3 bytes an element for bf16. The transpose is its own
          launch over 64 x 64 tiles: a row program would write 1-byte columns, 32 times the bytes it means to.
Not here  fp64 input, argument checks and dispatch (op.py).
"""

# Shapes: T = tokens, D = features, G = groups of d = D / G features, R = T * G rows of a tile's view [R, d].

import torch
import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import FORMAT_LEVELS, row_codes, row_scales, row_tile, tile_offsets
from bitmoe_kernels.sparsify.triton_kernels import topk_rows

_TRANSPOSE_TILE = 64
_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def norm_quantize_triton(
    x_TD: torch.Tensor,
    gain_D: torch.Tensor,
    eps: float,
    num_format: str,
    is_sub_norm: bool = False,
    groups: int = 1,
    keep: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int8 [..., D], scale and rstd fp32 [..., groups]; the norm is eq. 3 if ``is_sub_norm``, else eq. 2."""
    x_TD = x_TD.contiguous()
    codes_TD = torch.empty_like(x_TD, dtype=torch.int8)
    scale_TG = torch.empty(*x_TD.shape[:-1], groups, dtype=torch.float32, device=x_TD.device)
    rstd_TG = torch.empty_like(scale_TG)
    if num_rows := scale_TG.numel():
        num_features = x_TD.shape[-1] // groups
        tile = row_tile(max(2, num_features))
        with torch.cuda.device_of(x_TD):
            _norm_quant_fwd_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
                x_TD,
                gain_D.contiguous(),
                codes_TD,
                scale_TG,
                rstd_TG,
                num_rows,
                round(keep * num_features),
                eps,
                num_features,
                groups,
                is_sub_norm,
                keep < 1,
                num_format,
                FORMAT_LEVELS[num_format],
                **tile,
            )
    return codes_TD, scale_TG, rstd_TG


def transpose_codes_triton(codes_TD: torch.Tensor) -> torch.Tensor:
    """Codes int8 [T, D] as contiguous [D, T]."""
    codes_TD = codes_TD.contiguous()
    num_tokens, num_features = codes_TD.shape
    codes_DT = torch.empty(num_features, num_tokens, dtype=torch.int8, device=codes_TD.device)
    if num_tokens:
        tiles = triton.cdiv(num_tokens, _TRANSPOSE_TILE) * triton.cdiv(num_features, _TRANSPOSE_TILE)
        with torch.cuda.device_of(codes_TD):
            _transpose_kernel[(tiles,)](codes_TD, codes_DT, num_tokens, num_features, _TRANSPOSE_TILE, num_warps=4)
    return codes_DT


@triton.jit
def _norm_quant_fwd_kernel(
    x_ptr,
    gain_ptr,
    codes_ptr,
    scale_ptr,
    rstd_ptr,
    num_rows,
    num_kept,
    EPS: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    IS_SUB_NORM: tl.constexpr,
    IS_SPARSE: tl.constexpr,
    FORMAT: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    rows, mask_rows, offs, mask = tile_offsets(num_rows, NUM_FEATURES, BLOCK_ROWS, BLOCK_FEATURES)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    mean_square = tl.sum((x * x).to(tl.float64), axis=1) / NUM_FEATURES
    rstd = (1.0 / tl.sqrt(mean_square + tl.full(mean_square.shape, EPS, tl.float64))).to(tl.float32)
    tl.store(rstd_ptr + rows, rstd, mask=mask_rows)
    features = tl.arange(0, BLOCK_FEATURES)[None, :]
    offs_gain = (rows % NUM_GROUPS).to(tl.int32)[:, None] * NUM_FEATURES + features
    gain = tl.load(gain_ptr + offs_gain, mask=features < NUM_FEATURES, other=0.0).to(tl.float32)
    unit = x * rstd[:, None]
    if IS_SUB_NORM:
        unit = _round_to(unit, x_ptr.dtype.element_ty).to(tl.float32)
    y = _round_to(unit * gain, x_ptr.dtype.element_ty)
    scale = row_scales(y.to(tl.float32), NUM_FEATURES, FORMAT, LEVELS)
    tl.store(scale_ptr + rows, scale, mask=mask_rows)
    codes = row_codes(y.to(tl.float32), scale, FORMAT)
    if IS_SPARSE:
        if y.dtype == tl.float32:
            is_kept = topk_rows(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, num_kept, 31)
        else:
            is_kept = topk_rows(y.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, num_kept, 15)
        codes = tl.where(is_kept, codes, 0)
    tl.store(codes_ptr + offs, codes, mask=mask)


@triton.jit
def _round_to(x, dtype: tl.constexpr):
    """fp32 ``x`` rounded half to even to ``dtype``, as ``x.to(dtype)`` is on a GPU."""
    if dtype == tl.bfloat16 and _IS_INTERPRETED:
        # Triton's interpreter cuts bf16 off instead (seen in 3.6 and 3.9): round the bits before it does.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _transpose_kernel(codes_ptr, transposed_ptr, num_tokens, num_features, BLOCK: tl.constexpr):
    pid_tokens = tl.program_id(0) // tl.cdiv(num_features, BLOCK)
    pid_features = tl.program_id(0) % tl.cdiv(num_features, BLOCK)
    tokens = pid_tokens.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    features = pid_features.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (tokens < num_tokens)[:, None] & (features < num_features)[None, :]
    codes = tl.load(codes_ptr + tokens[:, None] * num_features + features[None, :], mask=mask, other=0)
    offs = features[:, None] * num_tokens + tokens[None, :]
    tl.store(transposed_ptr + offs, tl.trans(codes), mask=tl.trans(mask))
