"""Saving and loading a training run; every rank takes part.

megatron-core writes and reads the tensors, in a format any layout can load. Around it stands a commit protocol: write
into a temporary folder, sync, hash, write the manifest, rename. Until the rename the old checkpoints are untouched,
and after a load the fingerprint of every tensor must be the saved one.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint import CheckpointException

from bitmoe.config.errors import InputError
from bitmoe.data.tokenizer import Tokenizer
from bitmoe.parallel.agree import any_rank, on_first_rank
from bitmoe.parallel.process_groups import local_device
from bitmoe.train.checkpoint_folder import commit, newest_checkpoint, open_temporary, saved_state
from bitmoe.train.engine import MegatronEngine
from bitmoe.train.fingerprint import describe, fingerprints
from bitmoe.train.manifest import verify, write_manifest
from bitmoe.train.optimizer_state import load_optimizer_state, sharded_optimizer_state, steps_done
from bitmoe.train.rng_state import gather_rng_state, restore_rng_state, write_rng_state
from bitmoe.train.run_dir import config_dict
from bitmoe.train.save_strategy import save_strategy

__all__ = ["load_checkpoint", "newest_checkpoint", "save_checkpoint", "saved_state"]

# Manifest, plans and file headers; small next to any model.
_OVERHEAD_BYTES = 16 << 20


def save_checkpoint(
    folder: Path, engine: MegatronEngine, state: dict[str, Any], keep: int, tokenizer: Tokenizer | None = None
) -> Path:
    """Write ``step_<state["step"]>/`` and remove checkpoints that are too old; collective.

    Args:
        folder: ``<run>/checkpoints``, on a file system that all ranks share.
        engine: the run to save.
        state: JSON; must hold ``step``, the number of optimizer steps done.
        keep: how many checkpoints to keep, the new one included.
        tokenizer: the model's, so that the checkpoint can be used without its run.

    Returns:
        The new checkpoint.

    Raises:
        InputError: it could not be written, for want of space for instance; older ones are as they were.
    """
    engine.gather_parameters()
    contents = _contents(engine, is_loading=False)
    needed = _bytes_of_all_ranks(contents) + _OVERHEAD_BYTES
    temporary = on_first_rank(lambda: open_temporary(folder, state["step"], needed))
    try:
        if any_rank(not temporary.is_dir()):
            raise InputError(
                f"{folder} does not lie on a file system that all ranks share",
                fix="choose a shared place",
                key="run.dir",
            )
        _write(contents, temporary)
        content = _manifest_content(engine, state)
        rng_states = gather_rng_state()
        return on_first_rank(lambda: _finish(temporary, content, rng_states, tokenizer, keep))
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_checkpoint(path: Path, engine: MegatronEngine) -> dict[str, Any]:
    """Continue from a checkpoint, whatever layout wrote it; collective.

    Args:
        path: a committed checkpoint.
        engine: a new run of the same model; its parameters and optimizer state are replaced.

    Returns:
        The ``state`` given to ``save_checkpoint``.

    Raises:
        InputError: the checkpoint is damaged, not ours, of another model or of a newer megatron-core, or its tensors
            are not those that were saved.
    """
    manifest = on_first_rank(lambda: verify(path))
    _refuse_newer_library(path, manifest["versions"]["megatron_core"])
    _compare(path, "is of another model", manifest["tensors"], describe(engine.sharded_state()))
    loaded = dist_checkpointing.load(_contents(engine, is_loading=True), str(path), strict=StrictHandling.RAISE_ALL)
    with torch.no_grad():
        for name, shard in engine.sharded_state().items():
            shard.data.copy_(loaded["model"][name])
    load_optimizer_state(engine.optimizer, loaded["optimizer"], manifest["optimizer_steps"])
    engine.policy.parameters_changed()
    found = fingerprints(engine.sharded_state())
    _compare(path, "holds other values than were saved", manifest["fingerprints"], found)
    if manifest["layout"]["world_size"] == dist.get_world_size():
        restore_rng_state(path)
    return manifest["state"]


def _contents(engine: MegatronEngine, *, is_loading: bool) -> dict[str, dict]:
    model = engine.sharded_state()
    optimizer = sharded_optimizer_state(engine.optimizer, model, is_loading=is_loading)
    return {"model": model} | ({"optimizer": optimizer} if optimizer else {})


def _bytes_of_all_ranks(contents: dict[str, dict]) -> int:
    """Size of what all ranks together will write."""
    written = (
        shard.data.numel() * shard.data.element_size()
        for shard in nested_values(contents)
        if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id)
    )
    total = torch.tensor(sum(written), device=local_device())
    dist.all_reduce(total)
    return total.item()


def _write(contents: dict[str, dict], temporary: Path) -> None:
    try:
        dist_checkpointing.save(contents, str(temporary), sharded_strategy=save_strategy())
    except CheckpointException as error:
        # torch has told every rank what failed where.
        failed = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
        raise _not_written(temporary, failed) from None
    except OSError as error:
        raise _not_written(temporary, f"rank {dist.get_rank()}: {error}") from error


def _not_written(temporary: Path, failed: str) -> InputError:
    return InputError(
        f"the checkpoint {temporary.name} could not be written to {temporary.parent} ({failed})",
        fix="make room or choose another place, then continue the run; older checkpoints are as they were",
        key="run.dir",
    )


def _manifest_content(engine: MegatronEngine, state: dict[str, Any]) -> dict[str, Any]:
    tensors = engine.sharded_state()
    return {
        "step": state["step"],
        "state": state,
        "optimizer_steps": steps_done(engine.optimizer),
        "versions": {"megatron_core": megatron.core.__version__, "torch": torch.__version__},
        "layout": config_dict(engine.config)["parallel"] | {"world_size": dist.get_world_size()},
        "tensors": describe(tensors),
        "fingerprints": fingerprints(tensors),
    }


def _finish(
    temporary: Path,
    content: dict[str, Any],
    rng_states: dict[str, torch.Tensor],
    tokenizer: Tokenizer | None,
    keep: int,
) -> Path:
    try:
        write_rng_state(temporary, rng_states)
        if tokenizer is not None:
            tokenizer.save(temporary)
        write_manifest(temporary, content)
    except OSError as error:
        raise _not_written(temporary, str(error)) from error
    return commit(temporary, keep)


def _refuse_newer_library(path: Path, saved: str) -> None:
    own = megatron.core.__version__
    if _release(saved) > _release(own):
        raise InputError(
            f"checkpoint {path} was written with megatron-core {saved}, this is {own}",
            fix=f"install megatron-core {saved} (Python 3.12 or newer for 0.19)",
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _compare(path: Path, what: str, saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    different = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
    if not different:
        return
    shown = [f"{name}: {saved.get(name, 'none')} there, {own.get(name, 'none')} here" for name in different[:3]]
    if len(different) > len(shown):
        shown.append(f"and {len(different) - len(shown)} more")
    raise InputError(
        f"checkpoint {path} {what} ({'; '.join(shown)})",
        fix="give the run the model that wrote it, or choose another checkpoint",
    )
