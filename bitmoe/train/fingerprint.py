"""Descriptions and fingerprints of a model's tensors that do not depend on how it lies on ranks.

A checkpoint can load without any error and still be wrong: experts swapped, one rank's experts repeated, a matrix
transposed. The fingerprint of a tensor is the sum, modulo 2**64, of splitmix64(global index, raw bits) over its
elements. It depends on every bit and its place, and any cut of the tensor gives the same sum.
"""

from collections import Counter
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

from bitmoe.model.initialize import global_index, splitmix64

_CHUNK = 1 << 18
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def describe(sharded_state: Mapping[str, ShardedTensor]) -> dict[str, str]:
    """Dtype and global shape of every tensor of the model, such as ``float32 [192, 64]``; collective.

    Args:
        sharded_state: this rank's tensors (``MegatronEngine.sharded_state``).

    Returns:
        By name, with the layer in brackets; the same on every rank.
    """
    own = {}
    for shard in sharded_state.values():
        shape = list(shard.global_shape[shard.prepend_axis_num :])
        own[_name(shard)] = f"{str(shard.dtype).removeprefix('torch.')} {shape}"
    return {name: text for rank in _gather(own) for name, text in rank.items()}


@torch.no_grad()
def fingerprints(sharded_state: Mapping[str, ShardedTensor]) -> dict[str, str]:
    """Fingerprint of every tensor of the model, in hexadecimal; collective.

    Args:
        sharded_state: this rank's tensors (``MegatronEngine.sharded_state``).

    Returns:
        By name as in ``describe``; the same on every rank.
    """
    own = Counter()
    for shard in sharded_state.values():
        if is_main_replica(shard.replica_id):
            own[_name(shard)] += _sum_of_hashes(shard.data, lambda local, shard=shard: global_index(shard, local))
    total = Counter()
    for rank in _gather(own):
        total.update(rank)
    return {name: _hexadecimal(value) for name, value in total.items()}


@torch.no_grad()
def fingerprint(tensor: torch.Tensor, layer: int | None) -> str:
    """What ``fingerprints`` gives a tensor of one layer, from its whole value.

    Args:
        tensor: without the axis of layers.
        layer: its place on that axis; None if it has none.
    """
    first = (layer or 0) * tensor.numel()
    return _hexadecimal(_sum_of_hashes(tensor, lambda local: local + first))


def tensor_name(key: str, layer: int | None) -> str:
    """Name of a tensor of one layer in ``describe`` and ``fingerprints``."""
    return key if layer is None else f"{key}[{layer}]"


def _name(shard: ShardedTensor) -> str:
    return tensor_name(shard.key, shard.global_offset[0] if shard.prepend_axis_num else None)


def _hexadecimal(total: int) -> str:
    return f"{total % 2**64:016x}"


def _sum_of_hashes(tensor: torch.Tensor, index_of: Callable[[torch.Tensor], torch.Tensor]) -> int:
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = 0
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK].long()
        local = torch.arange(start, start + len(chunk), device=bits.device)
        total += splitmix64(index_of(local), chunk).sum().item()
    return total


def _gather(value: dict) -> list[dict]:
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
