"""Initial values that depend only on the seed, the parameter's global name and the element's global index.

Megatron draws initial values from per-rank generators, so its initial model depends on the layout. Here every element
is a hash of (seed, name, index) turned into a normal number, so any rank makes exactly its own part.

The hash is splitmix64 applied to a counter; two of them give one normal by Box-Muller in fp64, rounded to the
parameter's dtype.
"""

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from bitmoe.config.schema import ModelConfig

_MIX_1, _MIX_2, _GAMMA = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB
_CHUNK = 1 << 22


def initialize(sharded_state: dict[str, ShardedTensor], model: ModelConfig, seed: int) -> None:
    """Fill a model's parameters in place.

    Matrices are normal with ``model.init_std``; those that write to the residual stream (o, down) are divided by
    sqrt(2 * num_layers); norm gains are one.

    Args:
        sharded_state: this rank's parameters with their global names and places (``sharded_state_dict()`` of the
            model); buffers among them are left alone.
        model: init_std and num_layers.
        seed: ``run.seed``.
    """
    for shard in sharded_state.values():
        if not isinstance(shard, ShardedTensor) or not isinstance(shard.data, torch.nn.Parameter):
            continue
        if "norm" in shard.key:
            shard.data.data.fill_(1.0)
            continue
        writes_residual = "linear_proj" in shard.key or "fc2" in shard.key
        std = model.init_std / math.sqrt(2 * model.num_layers) if writes_residual else model.init_std
        _fill_normal(shard, std, _stream(seed, shard.key))


def _stream(seed: int, name: str) -> int:
    """A 64-bit start of the hash for one parameter."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _fill_normal(shard: ShardedTensor, std: float, stream: int) -> None:
    flat = shard.data.data.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        local = torch.arange(start, min(start + _CHUNK, flat.numel()), device=flat.device)
        flat[start : start + len(local)] = (std * normal_at(global_index(shard, local), stream)).to(flat.dtype)


def global_index(shard: ShardedTensor, local_index: torch.Tensor) -> torch.Tensor:
    """Row-major index in the global tensor of elements given by their row-major index in the local part.

    The global tensor may have leading dimensions (the layer) of which the local part is one slice.
    """
    prepended = len(shard.global_shape) - shard.data.dim()
    index, stride, rest = torch.zeros_like(local_index), 1, local_index
    local_shape = (1,) * prepended + tuple(shard.data.shape)
    dims = zip(local_shape, shard.global_shape, shard.global_offset, strict=True)
    for local_size, global_size, offset in reversed(list(dims)):
        index += (rest % local_size + offset) * stride
        rest = rest // local_size
        stride *= global_size
    return index


def normal_at(index: torch.Tensor, stream: int) -> torch.Tensor:
    """Standard normal numbers, one per index: a pure function of (index, stream), fp64 like ``index``."""
    first, second = (_uniform(splitmix64(2 * index + lane, stream)) for lane in (0, 1))
    return torch.sqrt(-2 * torch.log(first)) * torch.cos(2 * math.pi * second)


def _uniform(bits: torch.Tensor) -> torch.Tensor:
    """The upper 53 bits of an int64 as fp64 in (0, 1]."""
    return (((bits >> 11) & ((1 << 53) - 1)).double() + 1) * 2.0**-53


def splitmix64(counter: torch.Tensor, stream: int | torch.Tensor) -> torch.Tensor:
    """splitmix64's output function at ``stream + counter * gamma``; int64 arithmetic wraps as unsigned would.

    Args:
        counter: int64, any shape.
        stream: start of the sequence, or int64 of the same shape.
    """
    z = counter * _GAMMA + stream
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def _shift_right(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift of int64."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
