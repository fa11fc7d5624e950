"""What every test shares: the environment, the pools of ranks, and which tests run in one process.

``make test`` runs two pytest workers. Tests that use the ``ranks`` fixture go to one of them, so that ranks are started
once a world size: those of training to one worker, those of what comes before and after it, which need a single rank
mostly, to the other, which also takes the rest. A test that starts ranks in another way (by a command) joins them with
``@pytest.mark.xdist_group("ranks")``.
"""

import gc
import os

import pytest
import torch

from bitmoe.testing.ranks import RankPool

# Collecting tests imports all of them: see bitmoe.train.imports.
gc.disable()
# Read by the processes that tests start, and by datasets when test files import it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
# Read by Triton, which megatron-core imports with the first model: its kernels run on CPU in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


_MOSTLY_ONE_RANK = ("convert", "infer", "model", "tools")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if "ranks" in item.fixturenames:
            is_small = item.path.parent.name in _MOSTLY_ONE_RANK
            item.add_marker(pytest.mark.xdist_group("one rank" if is_small else "ranks"))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item):
    needed = 2 if item.get_closest_marker("multi_gpu") else 1 if item.get_closest_marker("gpu") else 0
    if torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} GPU(s), found {torch.cuda.device_count()}")


@pytest.fixture(scope="session")
def ranks():
    """``ranks(world_size).run(fn, *args)`` runs ``fn`` on so many gloo ranks: one result a rank, in order."""
    pools = {}

    def pool(world_size):
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool
    for started in pools.values():
        started.close()
