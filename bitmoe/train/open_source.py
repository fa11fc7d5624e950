"""Open what a user names as the weights of a model: a run, a checkpoint, or a folder of latent weights."""

from pathlib import Path

from bitmoe.config.errors import InputError
from bitmoe.train.checkpoint_folder import newest_checkpoint
from bitmoe.train.manifest import MANIFEST
from bitmoe.train.sharded_weights import ShardedWeights
from bitmoe.train.weight_folder import WeightFolder, is_weight_folder


def open_source(path: str | Path) -> ShardedWeights | WeightFolder:
    """Open the weights that ``find_source`` finds.

    Raises:
        InputError: there are none, or they are damaged.
    """
    found = find_source(path)
    return WeightFolder(found) if is_weight_folder(found) else ShardedWeights(found)


def find_source(path: str | Path) -> Path:
    """Where the weights of ``path`` lie: of a run its newest whole checkpoint, else ``path`` itself.

    Says so when a damaged checkpoint was passed over.

    Args:
        path: a run, a checkpoint, or a folder of latent weights.

    Raises:
        InputError: there are no weights.
    """
    path = Path(path)
    if is_weight_folder(path) or (path / MANIFEST).is_file():
        return path
    try:
        checkpoint = newest_checkpoint(path / "checkpoints", lambda text: print(f"warning: {text}", flush=True))
    except InputError as refused:
        raise InputError(refused.what, fix="restore one, or give other weights") from None
    if checkpoint is None:
        found = "holds neither a checkpoint nor converted weights" if path.is_dir() else "is no folder"
        raise InputError(
            f"{str(path)!r} {found}",
            fix="give a run, one of its checkpoints/step_*, or a folder that bitmoe convert to=checkpoint wrote",
        )
    return checkpoint
