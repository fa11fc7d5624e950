"""How a layer's parameter is cut over ranks, told once to the optimizer and once to the checkpoint.

megatron-core needs three things of a parameter: attributes for gradient norm and data-parallel reduction, and a
``ShardedTensor`` that says which part of the global tensor this rank holds. Getting one of them wrong trains a
different model without any error, so all layers use these functions.
"""

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.utils import sharded_state_dict_default

from bitmoe.parallel.process_groups import Groups


def mark_tensor_parallel(parameter: torch.nn.Parameter, dim: int) -> None:
    """Tell the optimizer that ranks of the tensor-parallel group hold different parts of this parameter."""
    parameter.tensor_model_parallel = True
    parameter.partition_dim = dim
    parameter.partition_stride = 1


def mark_expert(parameter: torch.nn.Parameter, dim: int) -> None:
    """Tell the optimizer that this parameter belongs to experts.

    ``allreduce=False`` reduces its gradient over the expert-data-parallel group. megatron-core 0.16.1 sets it only
    for EP > 1; with EP = 1 and ETP different from TP the replicas would silently diverge.
    """
    mark_tensor_parallel(parameter, dim)
    parameter.allreduce = False


def sharded_tensor(
    key: str,
    tensor: torch.Tensor,
    *,
    cuts: tuple[tuple[int, dist.ProcessGroup], ...],
    replicas: tuple[dist.ProcessGroup, ...],
    prepend: tuple[tuple[int, int, int], ...],
) -> ShardedTensor:
    """Describe this rank's part of a global tensor.

    Args:
        key: global name of the parameter.
        tensor: this rank's part.
        cuts: (dimension of ``tensor``, group its parts lie on) for every dimension that is split.
        replicas: groups whose ranks hold equal copies; rank 0 of each writes.
        prepend: offsets of dimensions put in front (the layer number), as megatron-core passes them down.
    """
    offsets = [(dim + len(prepend), group.rank(), group.size()) for dim, group in cuts]
    return ShardedTensor.from_rank_offsets(
        key,
        tensor,
        *prepend,
        *offsets,
        replica_id=(0, *(group.rank() for group in replicas)),
        prepend_axis_num=len(prepend),
    )


class ShardedParameters:
    """Mixin of a module that says for each own parameter how it is cut: ``cuts() -> {name: ((dim, group), ...)}``.

    Child modules bring their own description; parameters not named are replicated.
    """

    groups: Groups
    is_expert = False

    def cuts(self) -> dict[str, tuple[tuple[int, dist.ProcessGroup], ...]]:
        """Dimensions of own parameters that are split over process groups."""
        return {}

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Describe own parameters and those of child modules, in megatron-core's checkpoint format."""
        cuts, shards = self.cuts(), {}
        for name, tensor in self._parameters.items():
            if tensor is not None:
                cut = cuts.get(name, ())
                replicas = self._replica_groups(cut)
                key = f"{prefix}{name}"
                shards[key] = sharded_tensor(key, tensor, cuts=cut, replicas=replicas, prepend=tuple(sharded_offsets))
        for name, child in self.named_children():
            shards |= sharded_state_dict_default(
                child, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.groups.tp
            )
        return shards

    def _replica_groups(self, cut: tuple) -> tuple[dist.ProcessGroup, ...]:
        if self.is_expert:
            return (self.groups.edp,)
        return (self.groups.dp,) if cut else (self.groups.tp, self.groups.dp)
