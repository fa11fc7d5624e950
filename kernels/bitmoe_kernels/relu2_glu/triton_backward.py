"""Backward of ReLU2-GLU and sub-norm in one read of dy and gate_up; its result may be e4m3 codes.

What      README eq. 7-11, and 12 where the gradient goes on to 8-bit products as codes: it then never reaches memory in
          16 bits. fp32; dgate and dup are rounded once to the dtype of gate_up, and from there to e4m3, so that the
          codes have the bits of the separate steps.
Contract  gate_up, gain and dy in bf16, fp16 or fp32, for codes gate_up in bf16 and one group; any sizes; tensors are
          made contiguous; rows sorted by expert.
Tiling    that of triton_kernels.py. A program takes a block of tokens and keeps its share of the gain's gradient in
          registers; for codes a row of dgate and dup as well, a bf16 pair a register.
Order     the gain's gradient is summed per block of rows and expert, then over blocks: the same bits in every run.
Not here  fp64 input, argument checks and dispatch (op.py).
"""

# Shapes: T = tokens, F = features, G = groups of d = F / G features, E = experts, BR, P = rows and features of a piece,
# C = blocks of tokens.

import torch
import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import IS_INTERPRETED, held_to, round_to, to_float32
from bitmoe_kernels.act_quant.triton_pieces import load_piece, load_piece_again, store_codes, store_piece
from bitmoe_kernels.relu2_glu.reference import ends_of_experts
from bitmoe_kernels.relu2_glu.triton_kernels import few_pieces, relu_float32
from bitmoe_kernels.ternary_gemm.triton_grad import e4m3_bytes, power_scale

_REGISTERS = 128
_WARPS_IN_FLIGHT = 2112
"""Warps of a backward launch: 16, with _REGISTERS a thread, on each of an H200's 132 processors, in one wave. More and
smaller blocks of tokens would write more partial sums: 4 bytes a feature and block, beside 8 or 10 a feature and token.
"""
_NARROW_TILE = {"BLOCK_ROWS": 1, "BLOCK_FEATURES": 512, "num_warps": 2}
"""For 1,025 to 2,048 features: 8 a piece and thread, and two words spilled at most (none of 1,408 features: 0.39 ms
instead of 0.46, H200)."""
_SLOTS_A_STEP = 32
_GAINS_A_PROGRAM = 64


def relu2_glu_quantize_backward_triton(
    dy_TF: torch.Tensor,
    gate_up_T2F: torch.Tensor,
    gain: torch.Tensor | None,
    rstd_TG: torch.Tensor | None,
    expert_R: torch.Tensor | None,
    weight_T1: torch.Tensor | None = None,
    ends_E: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dgate_up [..., 2F] in the dtype of gate_up; fp32 dgain in the shape of the gain and dweight [..., 1], or None."""
    dgate_up_T2F = torch.empty_like(gate_up_T2F, memory_format=torch.contiguous_format)
    outputs = dgate_up_T2F, *[None] * 5
    return dgate_up_T2F, *_run(dy_TF, gate_up_T2F, gain, rstd_TG, expert_R, ends_E, weight_T1, outputs)


def relu2_glu_rounded_backward_triton(
    dy_TF: torch.Tensor,
    gate_up_T2F: torch.Tensor,
    gain: torch.Tensor | None,
    rstd_T1: torch.Tensor | None,
    expert_R: torch.Tensor | None,
    w_scale_E2: torch.Tensor,
    x_scale_T1: torch.Tensor,
    weight_T1: torch.Tensor | None = None,
    ends_E: torch.Tensor | None = None,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None, torch.Tensor | None]:
    """dgate_up as ``ternary_gemm``'s codes e4m3 [T, 2F], scale [T, 1], powers [T, 1] and [E]; dgain and dweight."""
    num_tokens, device = len(gate_up_T2F), gate_up_T2F.device
    codes_T2F = torch.empty(gate_up_T2F.shape, dtype=torch.int8, device=device)
    scale_T1, power_T1 = torch.empty(2, num_tokens, 1, dtype=torch.float32, device=device)
    largest_E = torch.zeros(len(w_scale_E2), dtype=torch.float32, device=device)
    scales = w_scale_E2.contiguous(), x_scale_T1.contiguous()
    outputs = codes_T2F, *scales, scale_T1, power_T1, largest_E
    others = _run(dy_TF, gate_up_T2F, gain, rstd_T1, expert_R, ends_E, weight_T1, outputs)
    return (codes_T2F.view(torch.float8_e4m3fn), scale_T1, power_T1, largest_E), *others


def _run(
    dy_TF, gate_up_T2F, gain, rstd_TG, expert_R, ends_E, weight_T1, outputs: tuple
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Fill ``outputs`` (dgate_up or its codes, and what belongs to codes); returns dgain and dweight."""
    gate_up_T2F = gate_up_T2F.contiguous()
    lead, size = gate_up_T2F.shape[:-1], gate_up_T2F.shape[-1] // 2
    num_tokens, device = gate_up_T2F.numel() // (2 * size), gate_up_T2F.device
    if expert_R is not None and ends_E is None:
        ends_E = ends_of_experts(expert_R, len(outputs[1] if gain is None else gain))
    groups = 1 if rstd_TG is None else rstd_TG.shape[-1]
    dgain = None if gain is None else torch.empty(gain.shape, dtype=torch.float32, device=device)
    dweight_TG = None if weight_T1 is None else torch.empty(num_tokens, groups, dtype=torch.float32, device=device)
    if not num_tokens:
        return None if dgain is None else dgain.zero_(), None if weight_T1 is None else weight_T1.float()
    tile = _tile(size // groups)
    tokens_a_block = tile["BLOCK_ROWS"]
    if gain is not None:
        tokens_a_block *= triton.cdiv(num_tokens * groups * tile["num_warps"], _WARPS_IN_FLIGHT * tokens_a_block)
    num_blocks = triton.cdiv(num_tokens, tokens_a_block)
    partial_SF = None
    with torch.cuda.device_of(gate_up_T2F):
        if gain is not None:
            gain, rstd_TG = gain.contiguous(), rstd_TG.contiguous()
            # Tokens are sorted by expert, so block c and expert e alone have slot c + e.
            num_slots = num_blocks + (0 if ends_E is None else len(ends_E) - 1)
            partial_SF = torch.empty(num_slots, size, dtype=torch.float32, device=device)
        _relu2_glu_bwd_kernel[(num_blocks, groups)](
            dy_TF.contiguous(),
            gate_up_T2F,
            gain,
            rstd_TG,
            None if weight_T1 is None else weight_T1.contiguous(),
            None if expert_R is None else expert_R.contiguous(),
            ends_E,
            *outputs,
            partial_SF,
            dweight_TG,
            num_tokens,
            tokens_a_block,
            size // groups,
            groups,
            gain is not None,
            expert_R is not None,
            outputs[1] is not None,
            **held_to(_REGISTERS, tile),
        )
        if gain is not None:
            _relu2_glu_bwd_gain_kernel[(triton.cdiv(size, _GAINS_A_PROGRAM), 1 if expert_R is None else len(ends_E))](
                partial_SF,
                ends_E,
                dgain,
                num_blocks,
                tokens_a_block,
                size,
                expert_R is not None,
                _SLOTS_A_STEP,
                _GAINS_A_PROGRAM,
                num_warps=4,
            )
    if weight_T1 is None:
        return dgain, None
    return dgain, (dweight_TG if groups == 1 else dweight_TG.sum(1)).view(*lead, 1)


def _tile(num_features: int) -> dict[str, int]:
    if not 1024 < num_features <= 2048:
        return few_pieces(num_features)
    return {"NUM_PIECES": triton.cdiv(num_features, _NARROW_TILE["BLOCK_FEATURES"]), **_NARROW_TILE}


@triton.jit
def _relu2_glu_bwd_kernel(
    dy_ptr,
    gate_up_ptr,
    gain_ptr,
    rstd_ptr,
    weight_ptr,
    expert_ptr,
    ends_ptr,
    out_ptr,
    w_scale_ptr,
    x_scale_ptr,
    scale_ptr,
    power_ptr,
    largest_ptr,
    partial_ptr,
    dweight_ptr,
    num_tokens,
    tokens_a_block,
    NUM_FEATURES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
    AS_CODES: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    SIZE: tl.constexpr = NUM_FEATURES * NUM_GROUPS
    offs_group = tl.program_id(1) * NUM_FEATURES
    block_start = tl.program_id(0) * tokens_a_block
    block_end = tl.minimum(block_start + tokens_a_block, num_tokens)
    first_expert, last_expert = 0, 0
    if HAS_EXPERTS:
        first_expert, last_expert = tl.load(expert_ptr + block_start), tl.load(expert_ptr + block_end - 1)
    for expert in range(first_expert, last_expert + 1):
        start, end = block_start, block_end
        if HAS_EXPERTS:
            start = tl.maximum(start, tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0))
            end = tl.minimum(end, tl.load(ends_ptr + expert))
        if HAS_NORM:
            gain_ptrs = gain_ptr + expert * SIZE + offs_group + tl.zeros([BLOCK_ROWS, 1], tl.int32)
            dgain = ()
            for _ in tl.static_range(NUM_PIECES):
                dgain = dgain + (tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.float32),)
        for first_token in range(start, end, BLOCK_ROWS):
            # Tokens past the end repeat the last one; their dy is 0 in the gain's gradient.
            tokens = first_token + tl.arange(0, BLOCK_ROWS)
            is_token = tokens < end
            tokens = tl.minimum(tokens, end - 1).to(tl.int64)
            dy_ptrs = dy_ptr + (tokens * SIZE + offs_group)[:, None]
            offs_gate = (tokens * (2 * SIZE) + offs_group)[:, None]
            if HAS_NORM:
                rstd = tl.load(rstd_ptr + tokens * NUM_GROUPS + tl.program_id(1))[:, None]
                new_dgain = ()
            if HAS_NORM or weight_ptr is not None:
                dots = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.float32)
                for piece in tl.static_range(NUM_PIECES):
                    relu = relu_float32(load_piece(gate_up_ptr + offs_gate, piece, NUM_FEATURES, BLOCK_FEATURES))
                    up = to_float32(load_piece(gate_up_ptr + offs_gate + SIZE, piece, NUM_FEATURES, BLOCK_FEATURES))
                    dy = to_float32(load_piece(dy_ptrs, piece, NUM_FEATURES, BLOCK_FEATURES))
                    if HAS_NORM:
                        dy *= to_float32(load_piece(gain_ptrs, piece, NUM_FEATURES, BLOCK_FEATURES))
                    dots += dy * to_float32(round_to(relu * relu * up, gate_up_ptr.dtype.element_ty))
                dot = tl.sum(dots, axis=1, keep_dims=True)
                if HAS_NORM:
                    dot *= rstd
                    mean = dot / NUM_FEATURES
                if weight_ptr is not None:
                    weight = tl.load(weight_ptr + tokens).to(tl.float32)[:, None]
                    tl.store(dweight_ptr + (tokens * NUM_GROUPS + tl.program_id(1))[:, None], dot)
                    if HAS_NORM:
                        mean *= weight
            pairs, largest = (), tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.int32)
            # Not in registers: that would leave no room for dgain.
            for piece in tl.static_range(NUM_PIECES):
                relu = relu_float32(load_piece_again(gate_up_ptr + offs_gate, piece, NUM_FEATURES, BLOCK_FEATURES))
                up = to_float32(load_piece_again(gate_up_ptr + offs_gate + SIZE, piece, NUM_FEATURES, BLOCK_FEATURES))
                dh = to_float32(load_piece_again(dy_ptrs, piece, NUM_FEATURES, BLOCK_FEATURES))
                if weight_ptr is not None:
                    dh *= weight
                if HAS_NORM:
                    unit = to_float32(round_to(relu * relu * up, gate_up_ptr.dtype.element_ty)) * rstd
                    dy = dh if BLOCK_ROWS == 1 else tl.where(is_token[:, None], dh, 0.0)
                    rounded_unit = to_float32(round_to(unit, gate_up_ptr.dtype.element_ty))
                    new_dgain = new_dgain + (dgain[piece] + dy * rounded_unit,)
                    dunit = dh * to_float32(load_piece(gain_ptrs, piece, NUM_FEATURES, BLOCK_FEATURES))
                    dh = rstd * (dunit - unit * mean)
                dup = dh * relu
                # Half of it: the other factor of 2 is as exact behind the rounding.
                dgate = dup * up
                dup *= relu
                if AS_CODES:
                    pair = _bf16_pair(dgate, dup)
                    pairs, largest = pairs + (pair,), _larger_magnitudes(largest, pair)
                else:
                    dgate = round_to(dgate + dgate, out_ptr.dtype.element_ty)
                    dup = round_to(dup, out_ptr.dtype.element_ty)
                    store_piece(out_ptr + offs_gate, dgate, piece, NUM_FEATURES, BLOCK_FEATURES)
                    store_piece(out_ptr + offs_gate + SIZE, dup, piece, NUM_FEATURES, BLOCK_FEATURES)
            if HAS_NORM:
                dgain = new_dgain
            if AS_CODES:
                w_gate, w_up = 2 * tl.load(w_scale_ptr + 2 * expert), tl.load(w_scale_ptr + 2 * expert + 1)
                absmax = tl.maximum(_magnitude(largest << 16) * w_gate, _magnitude(largest) * w_up)
                scale, reciprocal, power = power_scale(absmax, tl.load(x_scale_ptr + tokens))
                tl.store(scale_ptr + tokens, scale)
                tl.store(power_ptr + tokens, power)
                tl.atomic_max(largest_ptr + expert, tl.max(power, axis=0), sem="relaxed")
                is_finite = reciprocal > 0
                for piece in tl.static_range(NUM_PIECES):
                    dgate = _codes(pairs[piece] << 16, w_gate, reciprocal)
                    dup = _codes(pairs[piece], w_up, reciprocal)
                    store_codes(out_ptr + offs_gate, dgate, is_finite, piece, NUM_FEATURES, BLOCK_FEATURES)
                    store_codes(out_ptr + offs_gate + SIZE, dup, is_finite, piece, NUM_FEATURES, BLOCK_FEATURES)
        if HAS_NORM:
            slot = tl.program_id(0) + expert
            partial_ptrs = partial_ptr + slot * SIZE + offs_group + tl.zeros([1, 1], tl.int32)
            for piece in tl.static_range(NUM_PIECES):
                total = tl.sum(dgain[piece], axis=0, keep_dims=True)
                store_piece(partial_ptrs, total, piece, NUM_FEATURES, BLOCK_FEATURES)


@triton.jit
def _bf16_pair(low, high):
    """Two fp32 tiles rounded half to even to bf16, in the halves of one int32 tile."""
    if IS_INTERPRETED:
        low = round_to(low, tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | (round_to(high, tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        asm: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        return tl.inline_asm_elementwise(asm, "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _larger_magnitudes(largest, pair):
    """The larger of ``largest`` and the magnitudes of bf16 pairs, half by half; NaN is above Inf."""
    if IS_INTERPRETED:
        low, high = tl.maximum(largest & 0xFFFF, pair & 0x7FFF), tl.maximum(largest >> 16, (pair >> 16) & 0x7FFF)
        return low | (high << 16)
    else:
        asm: tl.constexpr = "{ .reg .b32 size; and.b32 size, $2, 0x7FFF7FFF; max.u16x2 $0, $1, size; }"
        return tl.inline_asm_elementwise(asm, "=r,r,r", [largest, pair], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _magnitude(bits):
    """The largest of each row, fp32 [BR], of magnitudes in the high halves of ``bits``; Inf where one is not finite."""
    return tl.minimum(tl.max(bits & 0x7FFF0000, axis=1), 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _codes(bits, w_scale, reciprocal):
    """Bytes of e4m3 codes of bf16 numbers in the high halves of ``bits``, if these are finite."""
    return e4m3_bytes((bits & -65536).to(tl.float32, bitcast=True) * w_scale * reciprocal[:, None])


@triton.jit
def _relu2_glu_bwd_gain_kernel(
    partial_ptr,
    ends_ptr,
    dgain_ptr,
    num_blocks,
    tokens_a_block,
    SIZE: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    expert = tl.program_id(1)
    first, end = 0, num_blocks
    if HAS_EXPERTS:
        start_token = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        end_token = tl.load(ends_ptr + expert)
        first = start_token // tokens_a_block
        # The slots of an expert without tokens may never have been written.
        end = tl.where(start_token < end_token, tl.cdiv(end_token, tokens_a_block), first)
    features = tl.program_id(0) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    sums = tl.zeros([BLOCK_SLOTS, BLOCK_FEATURES], tl.float32)
    for block in range(first, end, BLOCK_SLOTS):
        blocks = block + tl.arange(0, BLOCK_SLOTS)
        offs = (blocks + expert).to(tl.int64)[:, None] * SIZE + features[None, :]
        mask = (blocks < end)[:, None] & (features < SIZE)[None, :]
        sums += tl.load(partial_ptr + offs, mask=mask, other=0.0)
    tl.store(dgain_ptr + expert * SIZE + features, tl.sum(sums, axis=0), mask=features < SIZE)
