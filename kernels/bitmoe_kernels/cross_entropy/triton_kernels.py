"""Softmax statistics of logits in one read, and their gradient in one read and one write.

What      README eq. 1 and 4, over this rank's slice of the vocabulary.
Contract  bf16, fp16 or fp32 logits, contiguous; int64 labels, contiguous; slices of any width. The gradient may be
          written over the logits.
Tiling    forward: one program a row, in blocks of 4096. Each group of 8 neighbouring logits, which one thread loads
          with 16 bytes of bf16, keeps its own maximum and sum: the loop needs no exchange between threads, and one
          rescaling exponential for 8 logits. 2 bytes an element. Backward: one program a block of 4096; 2 + 2 bytes.
Numerics  fp32. Sums without atomics: two runs agree.
Not here  fp64 logits, argument checks, the exchange between ranks, autograd and dispatch (op.py).
"""

# Shapes: T = tokens, V = this rank's slice of the vocabulary, L x G = lanes x groups of 8 logits of a block.

import torch
import triton
import triton.language as tl

_BLOCK = 4096
_GROUP = 8
_NUM_WARPS = 8


def softmax_stats_triton(logits_TV: torch.Tensor, labels_T: torch.Tensor, first_id: int, num_ids: int) -> torch.Tensor:
    """Maximum, sum of exponentials below it and the label's logit, fp32 [3, T] (README eq. 1)."""
    num_tokens, vocab_size = logits_TV.shape
    stats_3T = torch.empty(3, num_tokens, dtype=torch.float32, device=logits_TV.device)
    if num_tokens:
        with torch.cuda.device_of(logits_TV):
            _cross_entropy_fwd_kernel[(num_tokens,)](
                logits_TV,
                labels_T,
                stats_3T,
                num_tokens,
                vocab_size,
                first_id,
                num_ids,
                _BLOCK // _GROUP,
                _GROUP,
                num_warps=_NUM_WARPS,
            )
    return stats_3T


def logits_grad_triton(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    first_id: int,
    max_T: torch.Tensor,
    sum_T: torch.Tensor,
    grad_loss_T: torch.Tensor,
    grad_TV: torch.Tensor,
) -> None:
    """Gradient of the logits (README eq. 4), written to ``grad_TV`` (may be ``logits_TV``)."""
    num_tokens, vocab_size = logits_TV.shape
    blocks_per_row = triton.cdiv(vocab_size, _BLOCK)
    if num_tokens:
        with torch.cuda.device_of(logits_TV):
            _cross_entropy_bwd_kernel[(num_tokens * blocks_per_row,)](
                logits_TV,
                labels_T,
                max_T,
                sum_T,
                grad_loss_T.contiguous(),
                grad_TV,
                vocab_size,
                first_id,
                blocks_per_row,
                _BLOCK,
                num_warps=_NUM_WARPS,
            )


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr,
    labels_ptr,
    stats_ptr,
    num_tokens,
    vocab_size,
    first_id,
    num_ids,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * vocab_size
    offs = tl.arange(0, LANES)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [L, G]
    lane_max = tl.full([LANES], float("-inf"), tl.float32)
    lane_sum = tl.zeros([LANES], tl.float32)
    for start in range(0, vocab_size, LANES * GROUP):
        columns = start + offs
        logits = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
        new_max = tl.maximum(lane_max, tl.max(logits, axis=1))
        shift = _finite(new_max)
        lane_sum = lane_sum * tl.exp(lane_max - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        lane_max = new_max
    row_max = tl.max(lane_max, axis=0)
    row_sum = tl.sum(lane_sum * tl.exp(lane_max - _finite(row_max)), axis=0)
    label = tl.load(labels_ptr + row)
    column = label - first_id
    is_here = (column >= 0) & (column < vocab_size)
    label_logit = tl.load(row_ptr + column, mask=is_here, other=0.0).to(tl.float32)
    label_logit = tl.where((label >= 0) & (label < num_ids), label_logit, float("nan"))
    tl.store(stats_ptr + row, row_max)
    tl.store(stats_ptr + num_tokens + row, row_sum)
    tl.store(stats_ptr + 2 * num_tokens + row, label_logit)


@triton.jit
def _finite(maximum):
    """Where there was nothing but -inf, 0 is subtracted: exponentials are 0 then, not NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _cross_entropy_bwd_kernel(
    logits_ptr,
    labels_ptr,
    max_ptr,
    sum_ptr,
    grad_loss_ptr,
    grad_ptr,
    vocab_size,
    first_id,
    blocks_per_row,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    columns = (tl.program_id(0) % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < vocab_size
    grad_loss = tl.load(grad_loss_ptr + row)
    scale = grad_loss / tl.load(sum_ptr + row)
    label_column = (tl.load(labels_ptr + row) - first_id).to(tl.int32)
    logits = tl.load(logits_ptr + row * vocab_size + columns, mask=mask, other=0.0).to(tl.float32)
    softmax = tl.exp(logits - tl.load(max_ptr + row)) * scale
    grad = tl.where(columns == label_column, softmax - grad_loss, softmax)
    tl.store(grad_ptr + row * vocab_size + columns, grad, mask=mask)
