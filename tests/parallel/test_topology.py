"""The rank grids against numbers by hand and against megatron-core's own."""

import pytest

from bitmoe.config.errors import InputError
from bitmoe.config.schema import ParallelConfig
from bitmoe.parallel.topology import Topology

AXES = {
    "tensor": ("attention", "tp"),
    "data": ("attention", "dp"),
    "pipeline": ("attention", "pp"),
    "expert_tensor": ("expert", "tp"),
    "expert": ("expert", "ep"),
    "expert_data": ("expert", "dp"),
}


def test_groups_by_hand():
    topology = Topology(ParallelConfig(tensor=2, expert=4, pipeline=2), 16)
    assert topology.attention_grid == {"tensor": 2, "data": 4, "pipeline": 2}
    assert topology.expert_grid == {"expert_tensor": 1, "expert": 4, "expert_data": 2, "pipeline": 2}
    assert topology.groups("tensor")[:2] == [[0, 1], [2, 3]]
    assert topology.groups("data")[:2] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert topology.groups("pipeline")[:2] == [[0, 8], [1, 9]]
    assert topology.groups("expert")[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert topology.groups("expert_data")[:2] == [[0, 4], [1, 5]]


@pytest.mark.parametrize(
    ("tensor", "pipeline", "expert", "expert_tensor", "world_size"),
    [(1, 1, 1, 1, 1), (2, 1, 2, 1, 2), (2, 2, 2, 1, 8), (1, 2, 2, 2, 16), (4, 1, 2, 2, 8), (3, 2, 1, 1, 12)],
)
def test_groups_are_megatrons(tensor, pipeline, expert, expert_tensor, world_size):
    from megatron.core.parallel_state import RankGenerator

    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor)
    topology = Topology(parallel, world_size)
    order = "tp-cp-ep-dp-pp"
    generators = {
        "attention": RankGenerator(tensor, 1, topology.data_parallel, pipeline, 1, order),
        "expert": RankGenerator(expert_tensor, expert, topology.expert_data_parallel, pipeline, 1, order),
    }
    for axis, (grid, token) in AXES.items():
        assert topology.groups(axis) == [list(group) for group in generators[grid].get_ranks(token)], axis


@pytest.mark.parametrize(("world_size", "fits"), [(0, False), (2, False), (4, True), (6, False), (8, True)])
def test_world_size_must_hold_both_grids(world_size, fits):
    parallel = ParallelConfig(tensor=2, expert=4)
    if fits:
        assert Topology(parallel, world_size).expert_data_parallel == world_size // 4
    else:
        with pytest.raises(InputError, match="a multiple of 4"):
            Topology(parallel, world_size)
