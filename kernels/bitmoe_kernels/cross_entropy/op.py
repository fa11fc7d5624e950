"""Public cross-entropy over a vocabulary split over ranks: checks, the ranks' exchange, autograd and dispatch.

Triton's kernels run on a GPU, else the reference; both sit between the same two collectives. Only the logits are kept
for the backward, in their own dtype; on a GPU neither fp32 logits nor the softmax are ever in memory.
"""

# Shapes: T = tokens (any leading dimensions), V = this rank's slice of the vocabulary.

import torch
import torch.distributed as dist

from bitmoe_kernels.cross_entropy.reference import logits_grad_reference, softmax_stats_reference
from bitmoe_kernels.dispatch import runs_triton
from bitmoe_kernels.validation import check_features


def vocab_parallel_cross_entropy(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> torch.Tensor:
    """Cross-entropy of each token in nats (README eq. 3), differentiable in the logits.

    Args:
        logits_TV: [..., V], this rank's slice: of size() equal slices of the vocabulary, in the order of the ranks.
            Every id of every slice takes part in the softmax, those of a padded vocabulary too.
        labels_T: token ids int64 [...], the same on all ranks.
        group: ranks the vocabulary is split over; None for one.
        inplace_backward: write the gradient over the logits instead of to new memory. Once the backward has run,
            nobody may read them, nor what shares their memory: autograd raises where it would (so does a second
            backward), but other code gets the gradient without notice.

    Returns:
        [...] in fp32 (fp64 for fp64 logits), the same on all ranks. NaN or +Inf in a row gives NaN; -Inf is a
        probability of 0.

    Raises:
        TypeError: logits that are not floating point, labels that are not int64.
        ValueError: shapes that do not fit, a leaf as logits with ``inplace_backward``, or (on CPU) a label outside the
            vocabulary; on other devices, where looking would make the device wait, such a label has the loss NaN.
    """
    check_features(logits_TV, "logits")
    if labels_T.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels_T.dtype}: cast them with .long()")
    if labels_T.shape != logits_TV.shape[:-1]:
        raise ValueError(
            f"labels of shape {list(labels_T.shape)} do not fit logits of shape {list(logits_TV.shape)}: "
            "pass one label for each row of logits"
        )
    if inplace_backward and logits_TV.is_leaf and logits_TV.requires_grad:
        raise ValueError("logits are a leaf, whose values the gradient would replace: use inplace_backward=False")
    vocab_size = logits_TV.shape[-1]
    _check_labels(labels_T, vocab_size * (1 if group is None else group.size()))
    loss_T = _VocabParallelCrossEntropy.apply(
        logits_TV.reshape(-1, vocab_size).contiguous(), labels_T.reshape(-1).contiguous(), group, inplace_backward
    )
    return loss_T.view(labels_T.shape)


def _check_labels(labels_T: torch.Tensor, num_ids: int) -> None:
    """On CPU, raise ValueError for a label that is no id of the vocabulary."""
    if labels_T.device.type == "cpu" and labels_T.numel():
        low, high = (int(label) for label in labels_T.aminmax())
        if low < 0 or high >= num_ids:
            raise ValueError(f"labels from {low} to {high} are outside the vocabulary, 0 to {num_ids - 1}")


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Both passes and the exchange of per-token statistics; the gradient needs no exchange."""

    @staticmethod
    def forward(ctx, logits_TV, labels_T, group, inplace_backward):
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        vocab_size = logits_TV.shape[1]
        stats = _triton_kernels().softmax_stats_triton if runs_triton(logits_TV) else softmax_stats_reference
        stats_3T = stats(logits_TV, labels_T, rank * vocab_size, size * vocab_size)
        max_T, sum_T, label_logit_T = _over_ranks(stats_3T, group) if size > 1 else stats_3T
        ctx.save_for_backward(logits_TV, labels_T, max_T, sum_T)
        ctx.first_id, ctx.inplace_backward = rank * vocab_size, inplace_backward
        return sum_T.log() - (label_logit_T - max_T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss_T):
        logits_TV, labels_T, max_T, sum_T = ctx.saved_tensors
        grad_TV = logits_TV.detach() if ctx.inplace_backward else torch.empty_like(logits_TV)
        grad = _triton_kernels().logits_grad_triton if runs_triton(logits_TV) else logits_grad_reference
        grad(logits_TV, labels_T, ctx.first_id, max_T, sum_T, grad_loss_T, grad_TV)
        if ctx.inplace_backward:
            # Whoever saved these logits for a backward that is still to come, this function included, raises there.
            torch.autograd.graph.increment_version(grad_TV)
        return grad_TV, None, None, None


def _over_ranks(stats_3T: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, ...]:
    """README eq. 2: maximum, sum and label's logit [T] over the whole vocabulary; ``stats_3T`` is overwritten."""
    max_T = stats_3T[0].clone()
    dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
    stats_3T[1] *= (stats_3T[0] - max_T).exp()
    dist.all_reduce(stats_3T[1:], group=group)
    return max_T, stats_3T[1], stats_3T[2]


def _triton_kernels():
    # Imported at the first use: not every machine has Triton.
    from bitmoe_kernels.cross_entropy import triton_kernels

    return triton_kernels
