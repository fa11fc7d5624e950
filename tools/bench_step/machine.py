"""The machine that a benchmark ran on: what it is, and its memory between two measurements."""

import gc
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def machine() -> dict:
    """Where this ran: device, versions, commit."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"torch": torch.__version__}
    for package in ("triton", "megatron-core", "transformers"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"gpu": device, **versions, "commit": _commit()}


def _commit() -> str | None:
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return None


def free_memory() -> None:
    """Give back what former trainers held: hooks and parameters refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
