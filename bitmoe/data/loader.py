"""Training and evaluation batches.

The order of the training text depends only on the seed and on the number of the sample
(``step * global_batch_size + row``), never on ranks, and there is no state to save but the step. An epoch is
a permutation of windows: the stable argsort of raw Philox output, which numpy keeps the same in every release
(the streams of ``Generator``'s methods it does not).
"""

# Legend: S = seq_length, B = rows asked for.

from collections.abc import Sequence

import numpy as np
import torch

from bitmoe.config.errors import InputError
from bitmoe.data.blend import Blend
from bitmoe.data.token_data import TokenData
from bitmoe.data.windows import Windows

_EVAL_KEY = 0
"""The order of held-out text is the same for every run.seed."""


class BatchLoader:
    """Shuffled, blended, endless training batches.

    Without weights all windows form one pool, each drawn once an epoch; with weights every part is a pool
    with epochs of its own.

    Args:
        data: what ``prepare`` returned.
        seq_length: tokens of a sequence, S.
        global_batch_size: sequences of one step over all ranks.
        seed: seed of the order.

    Raises:
        InputError: a part with fewer than S + 1 training tokens; a weight too small to draw from.
    """

    def __init__(self, data: TokenData, *, seq_length: int, global_batch_size: int, seed: int):
        for part in data.parts:
            _check_length(f"the training text of {part.name}", part.train.tokens, seq_length)
        groups = [data.parts] if data.weights is None else [[part] for part in data.parts]
        self._pools = [
            _ShuffledWindows(Windows([part.train for part in group], seq_length), (seed, number))
            for number, group in enumerate(groups)
        ]
        self._blend = Blend(data.weights or [1])
        self.global_batch_size = global_batch_size
        self.sequences_per_epoch = sum(len(pool.windows) for pool in self._pools)

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return some rows of a step's global batch.

        Args:
            step: number of the step, from 0.
            rows: B row numbers in [0, global_batch_size), for instance those of one rank's micro-batch.

        Returns:
            ``tokens`` and ``labels``, int64 [B, S]; labels are the tokens shifted by one.
        """
        samples = step * self.global_batch_size + _checked(rows, self.global_batch_size)
        pools, numbers = self._blend.locate(samples)
        windows = [self._pools[pool].read(number) for pool, number in zip(pools, numbers, strict=True)]
        return _split_labels(np.stack(windows))


class EvalLoader:
    """The held-out text in one fixed shuffled order, so that its first batches stand for all; nothing comes twice.

    Args:
        data: what ``prepare`` returned.
        seq_length: tokens of a sequence, S.
        global_batch_size: sequences of one batch over all ranks.

    Raises:
        InputError: held-out text too short for one sequence, or for one batch.
    """

    def __init__(self, data: TokenData, *, seq_length: int, global_batch_size: int):
        self.windows = Windows([part.eval for part in data.parts], seq_length)
        if len(self.windows) == 0:
            _check_length("the held-out text", max(part.eval.tokens for part in data.parts), seq_length)
        self.global_batch_size = global_batch_size
        self.num_batches = len(self.windows) // global_batch_size
        if self.num_batches == 0:
            raise InputError(
                f"the held-out text has {len(self.windows)} sequences of {seq_length} tokens, "
                f"but a batch has {global_batch_size}",
                fix="raise it, give more text, or lower context.seq_length or run.global_batch_size",
                key="data.eval_fraction",
            )
        self._order = _shuffled(len(self.windows), [_EVAL_KEY])

    def batch(self, number: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return some rows of an evaluation batch.

        Args:
            number: which batch, in [0, num_batches).
            rows: B row numbers in [0, global_batch_size).

        Returns:
            ``tokens`` and ``labels``, int64 [B, S].

        Raises:
            IndexError: there is no such batch.
        """
        if not 0 <= number < self.num_batches:
            raise IndexError(f"evaluation batch {number} of {self.num_batches}")
        samples = number * self.global_batch_size + _checked(rows, self.global_batch_size)
        return _split_labels(self.windows.read(self._order[samples]))

    def text(self, batches: int) -> np.ndarray:
        """Return the windows of the first ``batches`` batches, int64 [batches * global_batch_size, S + 1]."""
        return self.windows.read(self._order[: batches * self.global_batch_size])


class _ShuffledWindows:
    """Windows in a new order each epoch; keeps the orders of two epochs, 8 bytes a window each."""

    def __init__(self, windows: Windows, key: tuple[int, int]):
        self.windows = windows
        self._key = key
        self._orders: dict[int, np.ndarray] = {}

    def read(self, number: int) -> np.ndarray:
        """Window [S + 1] of the number-th sample drawn from this pool."""
        epoch, place = divmod(int(number), len(self.windows))
        return self.windows.read(self._order(epoch)[place : place + 1])[0]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            order = _shuffled(len(self.windows), [*self._key, epoch])
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) == 1} | {epoch: order}
        return self._orders[epoch]


def _shuffled(count: int, key: list[int]) -> np.ndarray:
    """A permutation of ``count`` that depends on ``key`` alone, in every release of numpy."""
    bits = np.random.Philox(np.random.SeedSequence(key))
    return np.argsort(bits.random_raw(count), kind="stable")


def _checked(rows: Sequence[int], global_batch_size: int) -> np.ndarray:
    """Row numbers as int64 [B]; one outside the global batch would silently be another step's sample."""
    numbers = np.asarray(rows, dtype=np.int64)
    if numbers.size and (numbers.min() < 0 or numbers.max() >= global_batch_size):
        raise IndexError(f"rows {numbers.min()} to {numbers.max()} of a global batch of {global_batch_size}")
    return numbers


def _split_labels(windows: np.ndarray) -> dict[str, torch.Tensor]:
    both = torch.from_numpy(windows)
    return {"tokens": both[:, :-1].contiguous(), "labels": both[:, 1:].contiguous()}


def _check_length(what: str, tokens: int, seq_length: int) -> None:
    if tokens <= seq_length:
        raise InputError(
            f"a sequence of {seq_length} tokens and its next token do not fit into {what}: {tokens} tokens",
            fix="lower it, or give more text (for the held-out part: raise data.eval_fraction)",
            key="context.seq_length",
        )
