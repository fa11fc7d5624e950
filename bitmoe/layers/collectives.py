"""Collectives on plain tensors, called inside autograd functions (they record no graph themselves).

Sequence-parallel tensors are split along dimension 0. ``tree_sum`` fixes the order in which partial sums are added:
halves of halves, so that a power-of-two number of ranks, each adding its own part first, gives the same bits.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

# Shapes: S = sequence, T = tokens, F = features of one rank, n = ranks of the group.


def gather_first_dim(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate every rank's [S/n, ...] along dimension 0 into [S, ...]."""
    if group.size() == 1:
        return x
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def tree_sum(part: Callable[[int], torch.Tensor], count: int, first: int = 0) -> torch.Tensor:
    """Add ``part(first)`` ... ``part(first + count - 1)`` as a binary tree of halves.

    Parts are made when the tree reaches them, so only about log2(count) of them exist at a time.
    """
    if count == 1:
        return part(first)
    half = count // 2
    return tree_sum(part, half, first) + tree_sum(part, count - half, first + half)


def sum_over_ranks(
    x: torch.Tensor, group: dist.ProcessGroup, *, scatter: bool, deterministic: bool = False
) -> torch.Tensor:
    """Add every rank's partial sum.

    Args:
        x: this rank's partial sum [S, ...].
        group: the ranks that hold the other parts.
        scatter: return only this rank's [S/n, ...] slice (sequence parallel).
        deterministic: gather the parts and add them with ``tree_sum``.
    """
    num_ranks = group.size()
    if num_ranks == 1:
        return x
    if deterministic:
        parts = gather_first_dim(x.unsqueeze(0), group)
        total = tree_sum(lambda rank: parts[rank], num_ranks)
        return total.chunk(num_ranks)[group.rank()].contiguous() if scatter else total
    if scatter:
        out = x.new_empty(x.shape[0] // num_ranks, *x.shape[1:])
        dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
        return out
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x


def features_to_rows(x_TF: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Exchange slices of features for whole rows: [T, F] on every rank becomes [T'/n, n*F], T' = T padded.

    Padding rows (zeros) come last; ``rows_to_features`` drops them again.
    """
    n, num_features = group.size(), x_TF.shape[1]
    padded = torch.nn.functional.pad(x_TF, (0, 0, 0, -x_TF.shape[0] % n))
    received = torch.empty_like(padded)
    dist.all_to_all_single(received, padded.contiguous(), group=group)
    return received.view(n, len(padded) // n, num_features).transpose(0, 1).flatten(1)


def rows_to_features(x_rows: torch.Tensor, num_tokens: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Undo ``features_to_rows``: [T'/n, n*F] becomes this rank's [T, F]."""
    n = group.size()
    blocks = x_rows.view(len(x_rows), n, x_rows.shape[1] // n).transpose(0, 1).contiguous()
    received = torch.empty_like(blocks)
    dist.all_to_all_single(received, blocks, group=group)
    return received.flatten(0, 1)[:num_tokens]
