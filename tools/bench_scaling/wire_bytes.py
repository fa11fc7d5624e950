"""Bytes that a forward pass really received from other ranks for the inputs of its linears.

What ``parallel.wire`` speaks of: the sequence-parallel all-gather in front of column-parallel linears, and the trip to
experts. Collectives are seen where torch runs them, whoever called them; only those of these two places are counted,
because the entrances of both are wrapped while counting lasts.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from bitmoe.layers import bit_linear
from bitmoe.layers.dispatch import Dispatch


@contextmanager
def counted_inputs() -> Iterator[Counter[str]]:
    """Count while the context lasts.

    Yields:
        Bytes by the type they travelled as: those of codes (uint8, int8 or bfloat16), float32 scales and probabilities,
        and int64 counts that say how many tokens go where.
    """
    received: Counter[str] = Counter()
    gather, send = _counting(bit_linear.gather_first_dim, received), _counting(Dispatch.send, received)
    with patch.object(bit_linear, "gather_first_dim", gather), patch.object(Dispatch, "send", send):
        yield received


def _counting(function: Callable, received: Counter[str]) -> Callable:
    def counting(*args, **kwargs):
        with _Collectives(received):
            return function(*args, **kwargs)

    return counting


class _Collectives(TorchDispatchMode):
    """Adds what each collective brings from other ranks."""

    def __init__(self, received: Counter[str]):
        super().__init__()
        self._received = received

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self._add(func, *args)
        return func(*args, **(kwargs or {}))

    def _add(self, func, *args) -> None:
        name = func.name().split(".")[0].removeprefix("c10d::")
        if name == "_allgather_base_":
            output, own = args[0], args[1].nbytes
        elif name == "alltoall_base_":
            output, own = args[0], _own_bytes(*args[:4])
        else:
            raise NotImplementedError(f"{name}: a collective on the way of codes that is not counted")
        self._received[str(output.dtype).removeprefix("torch.")] += output.nbytes - own


def _own_bytes(output: torch.Tensor, given: torch.Tensor, group, splits: list[int]) -> int:
    """What a rank of an all-to-all has from itself; ``splits`` are the rows it has from each rank, empty if equal."""
    group = dist.ProcessGroup.unbox(group)
    rows = splits[group.rank()] if splits else len(output) // group.size()
    return rows * output[:1].nbytes if rows else 0
