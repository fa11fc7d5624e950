"""How megatron-core's checkpoint files are written: by the ranks themselves.

Its own writer starts a manager process that imports torch (seconds, and an orphan when the run is killed) and forks
writers out of ranks that hold GPUs. torch's writer needs neither, and a failure on one rank reaches all of them as one
exception. The files are the same.
"""

from pathlib import Path

import torch.distributed.checkpoint
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)


class _SynchronousSave(TorchDistSaveShardedStrategy):
    def save(self, sharded_state_dict: dict, checkpoint_dir: str | Path) -> None:
        """Write this rank's main replicas; collective."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        torch.distributed.checkpoint.save(
            mcore_to_pyt_state_dict(by_key, is_loading=False),
            storage_writer=torch.distributed.checkpoint.FileSystemWriter(checkpoint_dir, sync_files=True),
            planner=MCoreSavePlanner(flatten_state_dict=False),
        )


def save_strategy() -> TorchDistSaveShardedStrategy:
    """The strategy for ``dist_checkpointing.save``."""
    return _SynchronousSave("torch_dist", 1)
