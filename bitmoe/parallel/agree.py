"""Decisions all ranks must share: what rank 0 found, and whether any rank wants to stop.

A rank that fails alone leaves its peers waiting in the next collective until a timeout. What can be refused is
therefore done by rank 0, and its refusal reaches everybody.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from bitmoe.config.errors import InputError
from bitmoe.parallel.process_groups import local_device

Result = TypeVar("Result")


def on_first_rank(function: Callable[[], Result]) -> Result:
    """Run ``function`` on rank 0 and give its result to every rank; every rank must call it.

    Raises:
        InputError: rank 0's, on every rank.
        RuntimeError: on the other ranks, when rank 0 failed otherwise.
    """
    outcome = [None, None]
    error: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except InputError as refused:
            error, outcome[1] = refused, (refused.what, refused.fix, refused.key)
        except BaseException as fault:
            error, outcome[1] = fault, f"{type(fault).__name__}: {fault}"
    # A group of its own: rank 0 may tokenize or hash for longer than a collective of the training may take.
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    dist.broadcast_object_list(outcome, src=0, group=patient)
    dist.destroy_process_group(patient)
    if error is not None:
        raise error
    if isinstance(outcome[1], tuple):
        what, fix, key = outcome[1]
        raise InputError(what, fix=fix, key=key)
    if outcome[1] is not None:
        raise RuntimeError(f"rank 0 failed: {outcome[1]}")
    return outcome[0]


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on any rank; every rank must call it."""
    votes = torch.tensor([int(flag)], device=local_device())
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())
