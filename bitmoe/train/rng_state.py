"""The state of torch's random generators on every rank, in one safetensors file.

Training draws no random numbers (there is no dropout, and the order of data is a function of the step), so this only
keeps what a user's own code may draw.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

FILE = "rng_state.safetensors"


def gather_rng_state() -> dict[str, torch.Tensor]:
    """Generator states of all ranks, by ``<device>.<rank>``: all on rank 0, none elsewhere; collective."""
    gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(_own_state(), gathered)
    return {f"{device}.{rank}": state for rank, own in enumerate(gathered or []) for device, state in own.items()}


def write_rng_state(folder: Path, states: dict[str, torch.Tensor]) -> None:
    """Write what ``gather_rng_state`` gave."""
    save_file(states, folder / FILE)


def restore_rng_state(folder: Path) -> None:
    """Set this rank's generators; those the checkpoint does not know stay as they are."""
    with safe_open(folder / FILE, framework="pt") as file:
        for device in _own_state():
            if (key := f"{device}.{dist.get_rank()}") in file.keys():  # noqa: SIM118 (not a dict)
                setter = torch.cuda.set_rng_state if device == "cuda" else torch.set_rng_state
                setter(file.get_tensor(key))


def _own_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
