"""Rotary position embedding of fused queries, keys and values: one read and one write in each direction.

What      README eq. 1-3. The forward reads [q ... q, k, v] of each key/value head and writes q, k and v; the backward
          reads their gradients and writes that of the fused tensor.
Contract  bf16, fp16 or fp32; any sizes with an even head. qkv is made contiguous; gradients may have any strides, as
          attention's backward returns them, with the last dimension contiguous (else they are copied).
Tiling    a program takes one key/value head of a block of tokens, so that the angles are loaded once for its Q + 1
          rotated heads; 8 neighbouring elements of each half of a head a thread: 16 bytes of bf16. 4 bytes an element.
Numerics  fp32, rounded once at the store; v is copied bit for bit.
Not here  fp64 input, argument checks, autograd and dispatch (op.py).
"""

# Shapes: S = sequence, B = batch, K = key/value heads, Q = query heads per key/value head, N = K * Q, D = width of a
#         head, P = D / 2 pairs, E = K * (Q + 2) * D, BT x BP = a program's tokens and pairs.

import torch
import triton
import triton.language as tl

_TILE_PAIRS = 1024
_NUM_WARPS = 4


def rope_qkv_fwd(
    qkv_SBE: torch.Tensor, cos_SP: torch.Tensor, sin_SP: torch.Tensor, num_kv_heads: int, queries_per_kv: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous q [S, B, N, D], k and v [S, B, K, D]."""
    qkv_SBE = qkv_SBE.contiguous()
    num_positions, batch, _ = qkv_SBE.shape
    like_qkv = {"dtype": qkv_SBE.dtype, "device": qkv_SBE.device}
    head_dim = 2 * cos_SP.shape[1]
    q_SBND = torch.empty(num_positions, batch, num_kv_heads * queries_per_kv, head_dim, **like_qkv)
    k_SBKD = torch.empty(num_positions, batch, num_kv_heads, head_dim, **like_qkv)
    v_SBKD = torch.empty(num_positions, batch, num_kv_heads, head_dim, **like_qkv)
    _launch(qkv_SBE, q_SBND, k_SBKD, v_SBKD, cos_SP, sin_SP, is_backward=False)
    return q_SBND, k_SBKD, v_SBKD


def rope_qkv_bwd(
    grad_q_SBND: torch.Tensor,
    grad_k_SBKD: torch.Tensor,
    grad_v_SBKD: torch.Tensor,
    cos_SP: torch.Tensor,
    sin_SP: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the fused tensor, contiguous [S, B, E]."""
    parts = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in (grad_q_SBND, grad_k_SBKD, grad_v_SBKD)]
    num_positions, batch, num_heads, head_dim = grad_q_SBND.shape
    num_features = (num_heads + 2 * grad_k_SBKD.shape[2]) * head_dim
    grad_SBE = torch.empty(num_positions, batch, num_features, dtype=grad_q_SBND.dtype, device=grad_q_SBND.device)
    _launch(grad_SBE, *parts, cos_SP, sin_SP, is_backward=True)
    return grad_SBE


def _launch(qkv_SBE, q_SBND, k_SBKD, v_SBKD, cos_SP, sin_SP, is_backward: bool) -> None:
    num_positions, batch, num_heads, head_dim = q_SBND.shape
    num_kv_heads = k_SBKD.shape[2]
    block_pairs = triton.next_power_of_2(head_dim // 2)
    block_tokens = max(1, _TILE_PAIRS // block_pairs)
    num_programs = triton.cdiv(num_positions * batch, block_tokens) * num_kv_heads
    if num_programs == 0:
        return
    with torch.cuda.device_of(qkv_SBE):
        _rope_kernel[(num_programs,)](
            qkv_SBE,
            q_SBND,
            k_SBKD,
            v_SBKD,
            cos_SP.contiguous(),
            sin_SP.contiguous(),
            num_positions * batch,
            batch,
            *q_SBND.stride()[:3],
            *k_SBKD.stride()[:3],
            *v_SBKD.stride()[:3],
            num_kv_heads,
            num_heads // num_kv_heads,
            head_dim // 2,
            is_backward,
            block_tokens,
            block_pairs,
            num_warps=_NUM_WARPS,
        )


@triton.jit
def _rope_kernel(
    qkv_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    num_tokens,
    batch,
    q_position_stride,
    q_batch_stride,
    q_head_stride,
    k_position_stride,
    k_batch_stride,
    k_head_stride,
    v_position_stride,
    v_batch_stride,
    v_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    QUERIES_PER_KV: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    head_dim = 2 * NUM_PAIRS
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    tokens = (tl.program_id(0) // NUM_KV_HEADS) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    mask = (tokens < num_tokens)[:, None] & (pairs < NUM_PAIRS)  # [BT, BP]
    positions, sequences = (tokens // batch).to(tl.int64)[:, None], (tokens % batch).to(tl.int64)[:, None]
    cos = tl.load(cos_ptr + positions * NUM_PAIRS + pairs, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + positions * NUM_PAIRS + pairs, mask=mask, other=0.0).to(tl.float32)
    if IS_BACKWARD:
        sin = -sin
    packed_heads = (tokens.to(tl.int64)[:, None] * NUM_KV_HEADS + kv_head) * (QUERIES_PER_KV + 2)
    packed_ptrs = qkv_ptr + packed_heads * head_dim + pairs
    q_ptrs = q_ptr + positions * q_position_stride + sequences * q_batch_stride + pairs
    q_ptrs += kv_head.to(tl.int64) * QUERIES_PER_KV * q_head_stride
    k_ptrs = k_ptr + positions * k_position_stride + sequences * k_batch_stride + pairs
    k_ptrs += kv_head.to(tl.int64) * k_head_stride
    v_ptrs = v_ptr + positions * v_position_stride + sequences * v_batch_stride + pairs
    v_ptrs += kv_head.to(tl.int64) * v_head_stride
    for query in range(QUERIES_PER_KV):
        _rotate_head(packed_ptrs + query * head_dim, q_ptrs, cos, sin, mask, NUM_PAIRS, IS_BACKWARD)
        q_ptrs += q_head_stride
    packed_ptrs += QUERIES_PER_KV * head_dim
    _rotate_head(packed_ptrs, k_ptrs, cos, sin, mask, NUM_PAIRS, IS_BACKWARD)
    packed_ptrs += head_dim
    for half in tl.static_range(2):
        source_ptrs, target_ptrs = _direction(packed_ptrs + half * NUM_PAIRS, v_ptrs + half * NUM_PAIRS, IS_BACKWARD)
        tl.store(target_ptrs, tl.load(source_ptrs, mask=mask), mask=mask)


@triton.jit
def _rotate_head(packed_ptrs, part_ptrs, cos, sin, mask, NUM_PAIRS: tl.constexpr, IS_BACKWARD: tl.constexpr):
    """Rotate one head of each token on its way from the packed tensor to its part, or back."""
    source_ptrs, target_ptrs = _direction(packed_ptrs, part_ptrs, IS_BACKWARD)
    first = tl.load(source_ptrs, mask=mask).to(tl.float32)  # [BT, BP]
    second = tl.load(source_ptrs + NUM_PAIRS, mask=mask).to(tl.float32)
    tl.store(target_ptrs, first * cos - second * sin, mask=mask)
    tl.store(target_ptrs + NUM_PAIRS, second * cos + first * sin, mask=mask)


@triton.jit
def _direction(packed_ptrs, part_ptrs, IS_BACKWARD: tl.constexpr):
    """Pointers of source and target."""
    if IS_BACKWARD:
        return part_ptrs, packed_ptrs
    else:
        return packed_ptrs, part_ptrs
