"""Order of sums, and the exchange of features for rows."""

import pytest
import torch
import torch.distributed as dist

from bitmoe.layers.collectives import features_to_rows, gather_first_dim, rows_to_features, sum_over_ranks, tree_sum


def tree(values: torch.Tensor) -> torch.Tensor:
    return tree_sum(values.__getitem__, len(values))


def test_tree_sum_adds_halves_of_halves():
    # In fp32 1e8 swallows a 1: each order of additions gives its own result.
    big, one = 1e8, 1.0
    assert tree(torch.tensor([big, -big, one, one])).item() == 2.0
    assert tree(torch.tensor([big, one, -big, one])).item() == 0.0
    assert tree(torch.tensor([[1.0, 2.0]])).tolist() == [1.0, 2.0]


def test_tree_sum_takes_any_number_of_parts():
    parts = torch.arange(1.0, 8.0)
    assert tree(parts).item() == 28.0
    assert tree(torch.tensor([1.0, 1e8, -1e8])).item() == 1.0


def exchange(num_tokens, dtype):
    group, rank = dist.group.WORLD, dist.get_rank()
    x_TF = whole(num_tokens, dtype)[:, rank * 3 : rank * 3 + 3].contiguous()
    rows = features_to_rows(x_TF, group)
    return rows, torch.equal(rows_to_features(rows, num_tokens, group), x_TF)


def whole(num_tokens, dtype):
    return (torch.arange(num_tokens * 6).view(num_tokens, 6) % 100).to(dtype)


@pytest.mark.parametrize("num_tokens", [4, 5, 1, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_rows_are_whole_and_come_back(num_tokens, dtype, ranks):
    (first, back_0), (second, back_1) = ranks(2).run(exchange, num_tokens, dtype)
    rows = torch.cat([first, second])
    assert len(first) == len(second)
    assert torch.equal(rows[:num_tokens], whole(num_tokens, dtype))
    assert not rows[num_tokens:].any()
    assert back_0
    assert back_1


def sums():
    group, rank = dist.group.WORLD, dist.get_rank()
    x = torch.arange(8.0).view(4, 2) * (rank + 1)
    results = {
        (scatter, deterministic): sum_over_ranks(x.clone(), group, scatter=scatter, deterministic=deterministic)
        for scatter in (False, True)
        for deterministic in (False, True)
    }
    return results, gather_first_dim(x, group)


def test_sum_over_ranks(ranks):
    total = torch.arange(8.0).view(4, 2) * 3
    answers = ranks(2).run(sums)
    for deterministic in (False, True):
        for rank, (results, _) in enumerate(answers):
            assert torch.equal(results[False, deterministic], total)
            assert torch.equal(results[True, deterministic], total[2 * rank : 2 * rank + 2])
    gathered = torch.cat([torch.arange(8.0).view(4, 2), torch.arange(8.0).view(4, 2) * 2])
    assert torch.equal(answers[0][1], gathered)
    assert torch.equal(answers[1][1], gathered)


def tree_over_ranks(values):
    group, rank = dist.group.WORLD, dist.get_rank()
    return sum_over_ranks(tree(values.chunk(2)[rank]), group, scatter=False, deterministic=True)


def test_tree_extends_over_ranks(ranks):
    """Ranks that add their own parts first continue the tree of one rank: the same bits."""
    values = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    wanted = tree(values)
    assert not torch.equal(wanted, values.flip(0).cumsum(0)[-1])
    assert all(torch.equal(total, wanted) for total in ranks(2).run(tree_over_ranks, values))
