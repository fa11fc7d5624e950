"""Process groups of a single rank, for tools that use the training layers outside a training run."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from bitmoe.config.schema import ParallelConfig
from bitmoe.parallel.process_groups import Groups, leave, make_groups, start


@contextmanager
def alone() -> Iterator[Groups]:
    """Groups in which this process is the only rank; afterwards there are none.

    Raises:
        RuntimeError: this process is part of a larger world already.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "BITMOE_RENDEZVOUS": f"file://{Path(folder)}/store"}
        former = {name: os.environ.get(name) for name in names}
        os.environ.update(names)
        try:
            start()
            if dist.get_world_size() != 1:
                raise RuntimeError(f"one of {dist.get_world_size()} ranks is not alone")
            yield make_groups(ParallelConfig())
        finally:
            leave()
            for name, value in former.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
