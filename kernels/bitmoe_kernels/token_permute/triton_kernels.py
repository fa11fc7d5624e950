"""Tokens to the rows of their experts and back: one kernel a direction, token by token.

What      README eq. 1-5, equal to reference.py bit for bit. Deterministic: no atomics, every element is written by one
          program.
Contract  maps [T, E] of less than 2**31 pairs; sums: bf16, fp16 or fp32; else any dtype. All is made contiguous.
Tiling    a program takes whole tokens (or, in a long row, 2,048 features of one): x is read once, K rows are
          written or read once, in loads of 16 bytes a thread where rows are multiples of that. Permuting row by row
          would read each token K times. The plan and gradients of probabilities: up to 4,096 pairs of token and expert
          a program; the plan in two launches, torch's running count of the blocks' counts between them: 2 bytes a pair.
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
_PAIRS = 4096
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def plan_rows_triton(routing_map_TE: torch.Tensor, topk: int) -> RowPlan:
    """README eq. 1."""
    num_tokens, num_experts = routing_map_TE.shape
    num_rows, device = num_tokens * topk, routing_map_TE.device
    # Zeros, so that a map with another number of experts never sends a later kernel out of its tensors.
    memory = torch.zeros(3 * num_rows + num_experts, dtype=torch.int32, device=device)
    source_R, row_R, expert_R, ends_E = memory.split([num_rows, num_rows, num_rows, num_experts])
    plan = RowPlan(source_R, row_R.view(num_tokens, topk), expert_R, ends_E)
    if num_tokens:
        tile = _pair_tile(num_experts)
        num_blocks = triton.cdiv(num_tokens, tile["BLOCK_TOKENS"])
        map_TE = routing_map_TE.contiguous().view(torch.uint8)
        counts = torch.empty(num_experts * num_blocks, dtype=torch.int32, device=device)
        with torch.cuda.device_of(map_TE):
            _count_kernel[(num_blocks,)](map_TE, counts, num_tokens, num_experts, **tile)
            running = counts.cumsum(0, dtype=torch.int32)
            _plan_kernel[(num_blocks,)](map_TE, running, *plan, num_tokens, num_rows, num_experts, topk, **tile)
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


def sum_rows_triton(dx_RH: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """README eq. 3: [T, H]."""
    dx_RH = dx_RH.contiguous()
    num_tokens, topk = plan.row_TK.shape
    out_TH = torch.empty(num_tokens, dx_RH.shape[1], dtype=dx_RH.dtype, device=dx_RH.device)
    if num_tokens:
        grid, tile = _tiles(*out_TH.shape)
        with torch.cuda.device_of(dx_RH):
            _sum_rows_kernel[grid](dx_RH, plan.row_TK, out_TH, num_tokens, dx_RH.shape[1], topk, **tile)
    return out_TH


def permute_probs_triton(probs_TE: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """README eq. 4: [R, 1]."""
    num_rows = len(plan.source_R)
    probs_R1 = torch.empty(num_rows, 1, dtype=probs_TE.dtype, device=probs_TE.device)
    if num_rows:
        with torch.cuda.device_of(probs_TE):
            _permute_probs_kernel[(triton.cdiv(num_rows, 512),)](
                probs_TE.contiguous(), plan.source_R, plan.expert_R, probs_R1, num_rows, probs_TE.shape[1], 512
            )
    return probs_R1


def permute_probs_backward_triton(dprobs_R1: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """README eq. 5: [T, E]."""
    (num_tokens, topk), num_experts = plan.row_TK.shape, len(plan.ends_E)
    dprobs_TE = torch.empty(num_tokens, num_experts, dtype=dprobs_R1.dtype, device=dprobs_R1.device)
    if num_tokens:
        tile = _pair_tile(num_experts)
        with torch.cuda.device_of(dprobs_R1):
            _permute_probs_bwd_kernel[(triton.cdiv(num_tokens, tile["BLOCK_TOKENS"]),)](
                dprobs_R1.contiguous(),
                plan.row_TK,
                plan.expert_R,
                dprobs_TE,
                num_tokens,
                num_experts,
                topk,
                **tile,
            )
    return dprobs_TE


def _pair_tile(num_experts: int) -> dict[str, int]:
    """Tile of a kernel that goes over all pairs of token and expert."""
    block_experts = triton.next_power_of_2(num_experts)
    block_tokens = min(128, max(1, _PAIRS // block_experts))
    return {"BLOCK_TOKENS": block_tokens, "BLOCK_EXPERTS": block_experts, "num_warps": 8}


def _tiles(num_tokens: int, num_features: int) -> tuple[tuple[int, int], dict]:
    """Grid and tile of a kernel whose features are independent."""
    block_features = min(_TILE, triton.next_power_of_2(num_features))
    # Scales are one number a token: many programs, for each takes its rows' places one after the other.
    block_tokens = min(64, _TILE // block_features)
    grid = (triton.cdiv(num_tokens, block_tokens), triton.cdiv(num_features, block_features))
    return grid, {"BLOCK_TOKENS": block_tokens, "BLOCK_FEATURES": block_features, "num_warps": 4}


@triton.jit
def _routed_pairs(map_ptr, num_tokens, NUM_EXPERTS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BE: tl.constexpr):
    """Tokens [BT, 1] and experts [1, BE] of this program, and whether each goes to each, 0 or 1 [BT, BE]."""
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    experts = tl.arange(0, BE)[None, :]
    mask = (tokens < num_tokens) & (experts < NUM_EXPERTS)
    is_routed = tl.load(map_ptr + tokens * NUM_EXPERTS + experts, mask=mask, other=0) != 0
    return tokens, experts, is_routed.to(tl.int32)


@triton.jit
def _count_kernel(
    map_ptr,
    count_ptr,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    """How many tokens of a block go to each expert; experts before blocks."""
    _, _, is_routed = _routed_pairs(map_ptr, num_tokens, NUM_EXPERTS, BLOCK_TOKENS, BLOCK_EXPERTS)
    experts = tl.arange(0, BLOCK_EXPERTS)
    count_ptrs = count_ptr + experts * tl.num_programs(0) + tl.program_id(0)
    tl.store(count_ptrs, tl.sum(is_routed, 0), mask=experts < NUM_EXPERTS)


@triton.jit
def _plan_kernel(
    map_ptr,
    running_ptr,
    source_ptr,
    row_ptr,
    expert_ptr,
    ends_ptr,
    num_tokens,
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    tokens, experts, is_routed = _routed_pairs(map_ptr, num_tokens, NUM_EXPERTS, BLOCK_TOKENS, BLOCK_EXPERTS)
    num_blocks, mask_experts = tl.num_programs(0), experts < NUM_EXPERTS
    # Rows up to and with this block's: those of this block are counted once more, one by one.
    last = tl.load(running_ptr + experts * num_blocks + tl.program_id(0), mask=mask_experts, other=0)
    rows = last - tl.sum(is_routed, 0, keep_dims=True) + tl.cumsum(is_routed, 0) - 1
    slots = tl.cumsum(is_routed, 1) - 1
    mask = (is_routed != 0) & (slots < TOPK) & (rows < num_rows)
    tl.store(row_ptr + tokens * TOPK + slots, rows, mask=mask)
    tl.store(source_ptr + rows, tokens, mask=mask)
    tl.store(expert_ptr + rows, experts, mask=mask)
    if tl.program_id(0) == 0:
        ends = tl.load(running_ptr + (experts + 1) * num_blocks - 1, mask=mask_experts)
        tl.store(ends_ptr + experts, ends, mask=mask_experts)


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
        offs = _row_offsets(row_ptr, tokens, mask_tokens, k, NUM_WORDS, TOPK) + words
        tl.store(rows_ptr + offs, tile, mask=mask, eviction_policy="evict_first")


@triton.jit
def _sum_rows_kernel(
    dx_ptr,
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
        total += to_float32(tl.load(dx_ptr + offs, mask=mask, other=0.0))
    out_ptrs = out_ptr + tokens[:, None] * NUM_FEATURES + features
    tl.store(out_ptrs, round_to(total, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _permute_probs_kernel(
    probs_ptr, source_ptr, expert_ptr, out_ptr, num_rows, NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    source = tl.load(source_ptr + rows, mask=mask, other=0).to(tl.int64)
    expert = tl.load(expert_ptr + rows, mask=mask, other=0)
    tl.store(out_ptr + rows, tl.load(probs_ptr + source * NUM_EXPERTS + expert, mask=mask), mask=mask)


@triton.jit
def _permute_probs_bwd_kernel(
    dprobs_ptr,
    row_ptr,
    expert_ptr,
    out_ptr,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    mask_tokens = tokens < num_tokens
    dprobs = tl.zeros((BLOCK_TOKENS, BLOCK_EXPERTS), dtype=out_ptr.dtype.element_ty)
    for k in tl.static_range(TOPK):
        rows = tl.load(row_ptr + tokens * TOPK + k, mask=mask_tokens, other=0)
        expert = tl.load(expert_ptr + rows, mask=mask_tokens, other=0)
        dprobs = tl.where(experts == expert[:, None], tl.load(dprobs_ptr + rows, mask=mask_tokens)[:, None], dprobs)
    mask = mask_tokens[:, None] & (experts < NUM_EXPERTS)
    tl.store(out_ptr + tokens[:, None] * NUM_EXPERTS + experts, dprobs, mask=mask)
