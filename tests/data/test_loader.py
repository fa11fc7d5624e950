"""Batches: each window once an epoch, the same rows on any layout and after a restart, refusals."""

import numpy as np
import pytest
import torch

from bitmoe.config.errors import InputError
from bitmoe.data.loader import BatchLoader, EvalLoader

S = 8
BATCH = 6
PINNED_ORDER = [64, 88, 8, 48, 16, 80, 0, 24, 40, 56, 32, 72]


def loader(data, seed=1, seq_length=S, batch=BATCH):
    return BatchLoader(data, seq_length=seq_length, global_batch_size=batch, seed=seed)


def firsts(batches, count):
    """First token of the first ``count`` samples: it names the window."""
    drawn = [batches.batch(step, range(BATCH))["tokens"][:, 0] for step in range(-(-count // BATCH))]
    return torch.cat(drawn)[:count].tolist()


def test_batch_shapes_and_shift(token_data):
    batch = loader(token_data([401])).batch(3, [4, 0])
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "tokens": ((2, S), torch.int64),
        "labels": ((2, S), torch.int64),
    }
    # The hand-made text counts up, so the label is the token plus one, and windows start at multiples of S.
    assert torch.equal(batch["labels"], batch["tokens"] + 1)
    assert (batch["tokens"][:, 0] % S == 0).all()
    assert batch["tokens"][0, 0] != batch["tokens"][1, 0]


def test_epoch_draws_each_window_once(token_data):
    batches = loader(token_data([401, 90, 17]))
    windows = [S * i for i in range(50)] + [1000 + S * i for i in range(11)] + [2000, 2000 + S]
    count = batches.sequences_per_epoch
    assert count == len(windows)
    drawn = firsts(batches, 3 * count)
    epochs = [drawn[i * count : (i + 1) * count] for i in range(3)]
    assert all(sorted(epoch) == windows for epoch in epochs)
    assert len({tuple(epoch) for epoch in [windows, *epochs]}) == 4


def test_last_partial_window_is_left_out(token_data):
    assert loader(token_data([S + 1])).sequences_per_epoch == 1
    assert loader(token_data([2 * S])).sequences_per_epoch == 1
    assert loader(token_data([2 * S + 1])).sequences_per_epoch == 2


@pytest.mark.parametrize("weights", [None, (0.3, 0.7)])
@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_rows_do_not_depend_on_ranks(token_data, weights, ranks):
    data = token_data([401, 90], weights)
    for step in (0, 11, 500):
        whole = loader(data).batch(step, range(BATCH))
        # Every rank has its own loader and reads only its rows.
        parts = [loader(data).batch(step, range(rank, BATCH, ranks)) for rank in range(ranks)]
        for key in ("tokens", "labels"):
            rebuilt = torch.empty_like(whole[key])
            for rank, part in enumerate(parts):
                rebuilt[rank::ranks] = part[key]
            assert torch.equal(rebuilt, whole[key])


def test_sample_order_does_not_depend_on_the_batch_size(token_data):
    data = token_data([401])
    small = torch.cat([loader(data, batch=2).batch(step, range(2))["tokens"] for step in range(3)])
    assert torch.equal(small, loader(data, batch=6).batch(0, range(6))["tokens"])


def test_restart_gives_the_same_batches(token_data):
    data = token_data([401, 90])
    running = loader(data)
    for step in range(40):
        expected = running.batch(step, range(BATCH))["tokens"]
    assert torch.equal(loader(data).batch(39, range(BATCH))["tokens"], expected)


def test_order_is_pinned(token_data):
    # A change here changes what every resumed run would read.
    assert firsts(loader(token_data([97]), seed=1234), 12) == PINNED_ORDER


def test_seeds_differ(token_data):
    data = token_data([401])
    assert firsts(loader(data, seed=1), 50) != firsts(loader(data, seed=2), 50)


def test_weights_decide_the_shares(token_data):
    drawn = np.array(firsts(loader(token_data([401, 41], (0.25, 0.75))), 400))
    assert (drawn < 1000).sum() == 100
    # The small part is read 60 times over, each window equally often.
    assert np.unique(drawn[drawn >= 1000], return_counts=True)[1].tolist() == [60] * 5


@pytest.mark.parametrize("rows", [[-1], [BATCH]])
def test_batch_refuses_rows_of_other_steps(token_data, rows):
    with pytest.raises(IndexError, match="of a global batch of 6"):
        loader(token_data([401])).batch(0, rows)


def test_sequence_longer_than_the_text(token_data):
    data = token_data([401, 20])
    loader(data, seq_length=19)
    with pytest.raises(InputError, match=r"context.seq_length: .* 20 tokens .* text of part1: 20 tokens"):
        loader(data, seq_length=20)
    EvalLoader(data, seq_length=40, global_batch_size=2)
    with pytest.raises(InputError, match=r"context.seq_length: .* 41 tokens .* held-out text: 41 tokens"):
        EvalLoader(data, seq_length=41, global_batch_size=2)


def test_eval_loader_reads_everything_once(token_data):
    batches = EvalLoader(token_data([401]), seq_length=S, global_batch_size=2)
    assert batches.num_batches == 2
    starts = [batches.batch(i, range(2))["tokens"][:, 0].tolist() for i in range(2)]
    assert sorted(starts[0] + starts[1]) == [401 + S * i for i in range(4)]
    again = EvalLoader(token_data([401]), seq_length=S, global_batch_size=2)
    assert [again.batch(i, range(2))["tokens"][:, 0].tolist() for i in range(2)] == starts
    with pytest.raises(IndexError, match="evaluation batch 2 of 2"):
        batches.batch(2, range(2))


def test_eval_loader_mixes_parts(token_data):
    batches = EvalLoader(token_data([401, 90]), seq_length=S, global_batch_size=5)
    starts = torch.cat([batches.batch(i, range(5))["tokens"][:, 0] for i in range(2)])
    assert sorted(starts.tolist()) == sorted(s + S * i for i in range(5) for s in (401, 1090))
    assert starts.tolist() != sorted(starts.tolist())
    text = torch.from_numpy(batches.text(2))
    assert torch.equal(text[:, 0], starts)
    assert torch.equal(text[5:, 1:], batches.batch(1, range(5))["labels"])


def test_eval_loader_refuses_less_than_a_batch(token_data):
    with pytest.raises(InputError, match=r"data.eval_fraction: .* has 5 sequences .* a batch has 6"):
        EvalLoader(token_data([401]), seq_length=S, global_batch_size=6)
