"""Tokens to the rows of their experts and back: one kernel a direction, token by token.

What      README eq. 1-5. All but dp of (5), an fp32 sum in another order, equal reference.py bit for bit.
          Deterministic: no atomics, every element is written by one program.
Contract  maps [T, E] of less than 2**31 pairs; permute: any dtype; else bf16, fp16 or fp32. All is made contiguous.
          The backward holds a whole row of y and of dout in registers, up to dispatch.LONGEST_ROW features.
Tiling    a program takes whole tokens (or, in a long row, 2,048 features of one): x or dout is read once, K rows are
          written or read once, in loads of 16 bytes a thread where rows are multiples of that. Permuting row by row
          would read each token K times. The plan: 4,096 pairs of token and expert a program, after a running count
          by torch over the transposed map: 18 bytes a pair, little beside the rows.
Not here  fp64, argument checks and dispatch (op.py).
"""

# Shapes: T = tokens, E = experts, K = experts of each token, R = T * K rows, H = features, W = words of a row,
#         BT x BF = tokens and features of a tile.

import math

import torch
import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import round_to, to_float32
from bitmoe_kernels.token_permute.reference import RowPlan

_TILE = 2048
_PLAN_TILE = 4096
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def plan_rows_triton(routing_map_TE: torch.Tensor, topk: int) -> RowPlan:
    """README eq. 1."""
    num_tokens, num_experts = routing_map_TE.shape
    num_rows, device = num_tokens * topk, routing_map_TE.device
    # Zeros, so that a map with another number of experts never sends a later kernel out of its tensors.
    memory = torch.zeros(3 * num_rows + num_experts, dtype=torch.int32, device=device)
    source_R, row_R, expert_R, ends_E = memory.split([num_rows, num_rows, num_rows, num_experts])
    expert_TK = torch.zeros(num_tokens, topk, dtype=torch.int64, device=device)
    plan = RowPlan(source_R, row_R.view(num_tokens, topk), expert_TK, expert_R, ends_E)
    if num_tokens:
        map_ET = routing_map_TE.T.to(torch.int32, memory_format=torch.contiguous_format)
        block_experts = triton.next_power_of_2(num_experts)
        block_tokens = min(128, max(1, _PLAN_TILE // block_experts))
        with torch.cuda.device_of(routing_map_TE):
            _plan_kernel[(triton.cdiv(num_tokens, block_tokens),)](
                routing_map_TE.contiguous().view(torch.uint8),
                map_ET.view(-1).cumsum(0, dtype=torch.int32),
                *plan,
                num_tokens,
                num_rows,
                num_experts,
                topk,
                block_tokens,
                block_experts,
                num_warps=8,
            )
    return plan


def permute_triton(x_TH: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """README eq. 2: [R, H]."""
    x_TH = x_TH.contiguous()
    word_size = math.gcd(4, x_TH.shape[1] * x_TH.itemsize, x_TH.storage_offset() * x_TH.itemsize)
    words_TW = x_TH.view(_WORDS[word_size])
    rows_RW = torch.empty(len(plan.source_R), words_TW.shape[1], dtype=words_TW.dtype, device=x_TH.device)
    if len(words_TW):
        grid, tile = _tiles(*words_TW.shape)
        with torch.cuda.device_of(x_TH):
            _permute_kernel[grid](
                words_TW, plan.row_TK, rows_RW, len(words_TW), words_TW.shape[1], plan.row_TK.shape[1], **tile
            )
    return rows_RW.view(x_TH.dtype)


def combine_triton(y_RH: torch.Tensor, probs_TK: torch.Tensor | None, plan: RowPlan) -> torch.Tensor:
    """README eq. 4, or eq. 3 without probabilities: [T, H]."""
    y_RH = y_RH.contiguous()
    num_tokens, topk = plan.row_TK.shape
    out_TH = torch.empty(num_tokens, y_RH.shape[1], dtype=y_RH.dtype, device=y_RH.device)
    if num_tokens:
        grid, tile = _tiles(*out_TH.shape)
        with torch.cuda.device_of(y_RH):
            _combine_kernel[grid](
                y_RH,
                None if probs_TK is None else probs_TK.contiguous(),
                plan.row_TK,
                out_TH,
                num_tokens,
                y_RH.shape[1],
                topk,
                enable_fp_fusion=False,
                **tile,
            )
    return out_TH


def combine_backward_triton(
    dout_TH: torch.Tensor, y_RH: torch.Tensor, probs_TK: torch.Tensor, plan: RowPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """README eq. 5: dy [R, H], dprobs fp32 [T, K]."""
    y_RH = y_RH.contiguous()
    num_tokens, topk = plan.row_TK.shape
    dy_RH = torch.empty_like(y_RH)
    dprobs_TK = torch.empty(num_tokens, topk, dtype=torch.float32, device=y_RH.device)
    if num_tokens:
        block_features = triton.next_power_of_2(y_RH.shape[1])
        block_tokens = max(1, _TILE // block_features)
        with torch.cuda.device_of(y_RH):
            _combine_bwd_kernel[(triton.cdiv(num_tokens, block_tokens),)](
                dout_TH.contiguous(),
                y_RH,
                probs_TK.contiguous(),
                plan.row_TK,
                dy_RH,
                dprobs_TK,
                num_tokens,
                y_RH.shape[1],
                topk,
                block_tokens,
                block_features,
                num_warps=min(16, max(4, block_features // 512)),
            )
    return dy_RH, dprobs_TK


def _tiles(num_tokens: int, num_features: int) -> tuple[tuple[int, int], dict]:
    """Grid and tile of a kernel whose features are independent."""
    block_features = min(_TILE, triton.next_power_of_2(num_features))
    block_tokens = _TILE // block_features
    grid = (triton.cdiv(num_tokens, block_tokens), triton.cdiv(num_features, block_features))
    return grid, {"BLOCK_TOKENS": block_tokens, "BLOCK_FEATURES": block_features, "num_warps": 4}


@triton.jit
def _plan_kernel(
    map_ptr,
    count_ptr,
    source_ptr,
    row_ptr,
    token_expert_ptr,
    row_expert_ptr,
    ends_ptr,
    num_tokens,
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    mask = (tokens < num_tokens) & (experts < NUM_EXPERTS)  # [BT, experts]
    is_routed = (tl.load(map_ptr + tokens * NUM_EXPERTS + experts, mask=mask, other=0) != 0).to(tl.int32)
    # Rows up to and with this one, experts before tokens.
    rows = tl.load(count_ptr + experts * num_tokens + tokens, mask=mask, other=0) - 1
    slots = tl.cumsum(is_routed, 1) - 1
    mask = mask & (is_routed != 0) & (slots < TOPK) & (rows < num_rows)
    tl.store(row_ptr + tokens * TOPK + slots, rows, mask=mask)
    tl.store(token_expert_ptr + tokens * TOPK + slots, experts.to(tl.int64), mask=mask)
    tl.store(source_ptr + rows, tokens, mask=mask)
    tl.store(row_expert_ptr + rows, experts, mask=mask)
    if tl.program_id(0) == 0:
        last = (experts + 1) * num_tokens - 1
        tl.store(ends_ptr + experts, tl.load(count_ptr + last, mask=experts < NUM_EXPERTS), mask=experts < NUM_EXPERTS)


@triton.jit
def _tile_offsets(num_tokens, NUM_FEATURES: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    """Tokens [BT] and features [1, BF] of this program's tile, and the masks [BT] and [BT, BF] of those that exist."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    features = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)[None, :]
    mask_tokens = tokens < num_tokens
    return tokens, features, mask_tokens, mask_tokens[:, None] & (features < NUM_FEATURES)


@triton.jit
def _row_offsets(row_ptr, tokens, mask_tokens, k, NUM_FEATURES: tl.constexpr, TOPK: tl.constexpr):
    """Where the k-th row of each token starts, [BT, 1]."""
    rows = tl.load(row_ptr + tokens * TOPK + k, mask=mask_tokens, other=0)
    return rows.to(tl.int64)[:, None] * NUM_FEATURES


@triton.jit
def _permute_kernel(
    words_ptr,
    row_ptr,
    rows_ptr,
    num_tokens,
    NUM_WORDS: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    tokens, words, mask_tokens, mask = _tile_offsets(num_tokens, NUM_WORDS, BLOCK_TOKENS, BLOCK_FEATURES)
    tile = tl.load(words_ptr + tokens[:, None] * NUM_WORDS + words, mask=mask)
    for k in tl.static_range(TOPK):
        tl.store(rows_ptr + _row_offsets(row_ptr, tokens, mask_tokens, k, NUM_WORDS, TOPK) + words, tile, mask=mask)


@triton.jit
def _combine_kernel(
    y_ptr,
    probs_ptr,
    row_ptr,
    out_ptr,
    num_tokens,
    NUM_FEATURES: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    tokens, features, mask_tokens, mask = _tile_offsets(num_tokens, NUM_FEATURES, BLOCK_TOKENS, BLOCK_FEATURES)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_FEATURES), dtype=tl.float32)
    # Unrolled, so that loads of several rows are in flight.
    for k in tl.static_range(TOPK):
        offs = _row_offsets(row_ptr, tokens, mask_tokens, k, NUM_FEATURES, TOPK) + features
        y = to_float32(tl.load(y_ptr + offs, mask=mask, other=0.0))
        if probs_ptr is not None:
            probs = tl.load(probs_ptr + tokens * TOPK + k, mask=mask_tokens, other=0.0).to(tl.float32)
            y = y * probs[:, None]
        total += y
    out_ptrs = out_ptr + tokens[:, None] * NUM_FEATURES + features
    tl.store(out_ptrs, round_to(total, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine_bwd_kernel(
    dout_ptr,
    y_ptr,
    probs_ptr,
    row_ptr,
    dy_ptr,
    dprobs_ptr,
    num_tokens,
    NUM_FEATURES: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    tokens, features, mask_tokens, mask = _tile_offsets(num_tokens, NUM_FEATURES, BLOCK_TOKENS, BLOCK_FEATURES)
    dout = to_float32(tl.load(dout_ptr + tokens[:, None] * NUM_FEATURES + features, mask=mask, other=0.0))
    for k in tl.static_range(TOPK):
        offs = _row_offsets(row_ptr, tokens, mask_tokens, k, NUM_FEATURES, TOPK) + features
        y = to_float32(tl.load(y_ptr + offs, mask=mask, other=0.0))
        probs = tl.load(probs_ptr + tokens * TOPK + k, mask=mask_tokens, other=0.0).to(tl.float32)
        tl.store(dy_ptr + offs, round_to(dout * probs[:, None], dy_ptr.dtype.element_ty), mask=mask)
        tl.store(dprobs_ptr + tokens * TOPK + k, tl.sum(dout * y, axis=1), mask=mask_tokens)
