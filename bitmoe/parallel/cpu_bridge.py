"""Runs megatron-core on machines without CUDA: the one place that changes modules we do not own.

megatron-core takes CUDA for granted in its optimizers, schedules, random state and checkpoint writer. Each change
below answers one of those places with its CPU meaning. Nothing happens where CUDA exists, and whatever a layer
spec lets us own (norms, linears, attention, experts) is owned instead of bridged. Verified on 0.16.1 and 0.19.2.
"""

import contextlib
import functools

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _CpuDevices(TorchFunctionMode):
    """Maps ``device="cuda"`` to the CPU and answers the optimizer's type check with the CUDA type name.

    The gradient scaler, gradient clipping, the schedules and the auxiliary-loss tracker create tensors with a literal
    "cuda" device; the distributed optimizer compares ``param.type()`` with "torch.cuda.FloatTensor".
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


class _NoStream:
    """Stands for a CUDA stream or event: work on the CPU is already in order."""

    def __init__(self, *args, **kwargs):
        pass

    def record_event(self, *args):
        return self

    def _nothing(self, *args, **kwargs):
        return None

    wait_stream = wait_event = wait = record = synchronize = _nothing


def _same_tensor(tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return tensor


def _typed(dtype: torch.dtype):
    return functools.partial(torch.tensor, dtype=dtype, device=_CPU)


def _replace_cuda_functions() -> None:
    """torch.cuda: device queries answer the CPU, streams and synchronization do nothing."""
    cuda = torch.cuda
    cuda.current_device = lambda: _CPU
    # Each its own function: torch.compile refuses one object under two names it has different rules for.
    cuda.set_device = lambda *args, **kwargs: None
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda *args, **kwargs: None
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = lambda *args, **kwargs: _NoStream()
    cuda.default_stream = lambda *args, **kwargs: _NoStream()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.FloatTensor, cuda.IntTensor, cuda.LongTensor = map(_typed, (torch.float, torch.int, torch.long))
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    torch.Tensor.cuda = _same_tensor


def _replace_megatron_functions() -> None:
    """megatron-core: random state lives in torch's CPU generator; split sizes stay numpy as gloo wants them."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    to_host = moe_utils.maybe_move_tensor_to_cpu

    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        """The original returns a CPU tensor unchanged even when numpy was asked for."""
        if torch.is_tensor(tensor) and as_numpy and not tensor.is_cuda:
            return tensor.numpy()
        return to_host(tensor, as_numpy, record_stream)

    moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


@functools.cache
def install() -> bool:
    """Bridge megatron-core to the CPU if this machine has no CUDA; True if it did. Safe to call again."""
    if torch.cuda.is_available():
        return False
    _replace_cuda_functions()
    _replace_megatron_functions()
    # megatron-core compiles small functions; on a CPU that would need a C++ compiler.
    torch.compiler.set_stance("force_eager")
    _CpuDevices().__enter__()
    return True
