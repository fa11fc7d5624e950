"""Which rank does what: the two grids that one world of ranks is cut into. Plain integers, no process group.

Attention and the dense parts lie on a grid tensor x data x pipeline, routed experts on a grid expert-tensor x
expert x expert-data x pipeline, both over the same ranks. megatron-core numbers ranks in the order tp-cp-ep-
dp-pp: the axis named first runs fastest, so a tensor group is a block of neighbouring ranks (one host, the
fast links) and pipeline stages are the farthest apart. An axis that a grid lacks (ep for attention, cp for
experts) has size one there.
"""

from dataclasses import dataclass
from math import prod

from bitmoe.config.errors import InputError
from bitmoe.config.schema import ParallelConfig


@dataclass(frozen=True)
class Topology:
    """The layout of a model over ``world_size`` ranks.

    Args:
        parallel: the sizes that the config gives.
        world_size: all ranks; what the model does not take is data parallel.

    Raises:
        InputError: the world holds no whole number of copies of both grids.
    """

    parallel: ParallelConfig
    world_size: int

    def __post_init__(self):
        if self.world_size < 1 or self.world_size % self.parallel.smallest_world_size:
            raise InputError(
                f"{self.world_size} ranks do not fit the layout",
                fix=f"a multiple of {self.parallel.smallest_world_size}",
                key="world size",
            )

    @property
    def data_parallel(self) -> int:
        """Copies of attention and the dense parts; each sees its own sequences."""
        return self.world_size // self.parallel.attention_ranks

    @property
    def expert_data_parallel(self) -> int:
        """Copies of every routed expert."""
        return self.world_size // self.parallel.expert_ranks

    @property
    def attention_grid(self) -> dict[str, int]:
        """Size by axis, the fastest first."""
        return {
            "tensor": self.parallel.tensor,
            "data": self.data_parallel,
            "pipeline": self.parallel.pipeline,
        }

    @property
    def expert_grid(self) -> dict[str, int]:
        """Size by axis, the fastest first."""
        return {
            "expert_tensor": self.parallel.expert_tensor,
            "expert": self.parallel.expert,
            "expert_data": self.expert_data_parallel,
            "pipeline": self.parallel.pipeline,
        }

    def groups(self, axis: str) -> list[list[int]]:
        """The ranks that differ along one axis alone, group by group: those a collective of that axis joins.

        Args:
            axis: a key of ``attention_grid`` or ``expert_grid``.

        Returns:
            Lists of ascending ranks, in the order of their first rank; every rank is in one of them.
        """
        grid = self.attention_grid if axis in self.attention_grid else self.expert_grid
        axes = list(grid)
        stride = prod(grid[name] for name in axes[: axes.index(axis)])
        block = stride * grid[axis]
        firsts = (rank for rank in range(self.world_size) if rank % block < stride)
        return [[first + i * stride for i in range(grid[axis])] for first in firsts]
