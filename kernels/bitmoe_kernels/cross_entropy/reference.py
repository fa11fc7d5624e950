"""Softmax statistics of a slice of the vocabulary and the gradient of its logits: the truth for every implementation.

Plain torch in fp32 (fp64 for fp64 logits). Equation numbers are those of the README; what the ranks exchange in between
is in op.py. Arguments are not validated here.
"""

# Shapes: T = tokens, V = this rank's slice of the vocabulary.

import torch


def softmax_stats_reference(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, first_id: int, num_ids: int
) -> torch.Tensor:
    """Equation 1: maximum, sum of exponentials below it and the label's logit, [3, T]; ids start at ``first_id``."""
    logits_TV = logits_TV.to(_compute_dtype(logits_TV))
    max_T = logits_TV.amax(-1)
    sum_T = (logits_TV - _finite(max_T)[:, None]).exp().sum(-1)
    column_T = labels_T - first_id
    is_here_T = (column_T >= 0) & (column_T < logits_TV.shape[-1])
    label_logit_T = logits_TV.gather(-1, column_T.where(is_here_T, 0)[:, None])[:, 0].where(is_here_T, 0.0)
    return torch.stack((max_T, sum_T, label_logit_T.where((labels_T >= 0) & (labels_T < num_ids), torch.nan)))


def logits_grad_reference(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    first_id: int,
    max_T: torch.Tensor,
    sum_T: torch.Tensor,
    grad_loss_T: torch.Tensor,
    grad_TV: torch.Tensor,
) -> None:
    """Equation 4 with the maximum and sum over the whole vocabulary, written to ``grad_TV`` (may be ``logits_TV``)."""
    softmax_TV = (logits_TV.to(max_T.dtype) - max_T[:, None]).exp() / sum_T[:, None]
    ids_V = first_id + torch.arange(logits_TV.shape[-1], device=logits_TV.device)
    grad_TV.copy_((softmax_TV - (labels_T[:, None] == ids_V).to(max_T.dtype)) * grad_loss_T[:, None])


def _finite(max_T: torch.Tensor) -> torch.Tensor:
    """A slice of -inf alone has the sum 0, not NaN: another rank's slice may hold the maximum."""
    return max_T.where(max_T != -torch.inf, 0.0)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
