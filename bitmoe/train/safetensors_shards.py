"""Tensors in a folder of safetensors files, laid out as Hugging Face does: shards and one index.

Writing takes the tensors of one shard at a time from whoever makes them, so no more than a shard is in memory. Reading
trusts nothing: the index may name plain safetensors files of its own folder only, names and sizes are compared before
a value is read, and pickles in place of safetensors are refused without opening them.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bitmoe.config.errors import InputError
from bitmoe.train.run_dir import replace_file, sync_folder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD_NAME = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DOWNLOAD = "download or copy the file again"


class Stored(NamedTuple):
    """What the header of a shard says of one tensor."""

    file: str
    """Name of the shard."""
    dtype: str
    """As safetensors spells it: ``F32``, ``BF16``, ``U8`` and so on."""
    shape: tuple[int, ...]


def write_shards(
    folder: Path, shards: Sequence[Iterable[tuple[str, torch.Tensor]]], progress: Callable[[str], None]
) -> None:
    """Write one file a shard and the index.

    Args:
        folder: an existing folder without tensors.
        shards: of each file the names and tensors, which may be made while they are iterated.
        progress: called with the name of each tensor that was made.
    """
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        sizes = _write_shard(folder / file, tensors, progress)
        weight_map |= dict.fromkeys(sizes, file)
        total_bytes += sum(sizes.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    replace_file(folder / INDEX, json.dumps(index, indent=1).encode())
    sync_folder(folder)


class Shards:
    """Reads what ``write_shards`` and Hugging Face's ``save_pretrained`` write.

    Args:
        folder: holds ``model.safetensors``, or shards and their index.

    Raises:
        InputError: no safetensors, an index that leaves the folder, or a file that is damaged, missing, or holds other
            tensors than the index says.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        weight_map = self._weight_map()
        files = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
        self.stored = {name: stored for file in files for name, stored in self._header(file).items()}
        """Every tensor by its name."""
        for name in sorted(self.stored.keys() | weight_map.keys()) if weight_map is not None else ():
            listed, found = weight_map.get(name), self.stored.get(name)
            if found is None or listed != found.file:
                where = "no file" if found is None else found.file
                raise InputError(f"{folder / INDEX}: {name} is listed in {listed}, and is in {where}", fix=_DOWNLOAD)

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """One tensor on the CPU, or one row of it along the first dimension, of which alone is read.

        Raises:
            InputError: the file is damaged, or a value is NaN or infinite.
        """
        path = self._folder / self.stored[name].file
        try:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name) if row is None else file.get_slice(name)[row]
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds NaN or infinity", fix="give another model: this one is broken")
        return tensor

    def describe(self, name: str) -> str:
        """A stored tensor for a message: file and name."""
        return f"{self._folder / self.stored[name].file}: {name}"

    def _weight_map(self) -> dict[str, str] | None:
        """File of each tensor by the index; None where there is only one file."""
        path = self._folder / INDEX
        if not path.exists():
            if (self._folder / SINGLE).exists():
                return None
            raise self._no_safetensors()
        try:
            weight_map = json.loads(path.read_bytes())["weight_map"]
            names = weight_map.items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} is no index of safetensors ({type(error).__name__})", fix=_DOWNLOAD) from error
        for name, file in names:
            if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
                raise InputError(
                    f"{path}: {name} is said to be in {file!r}, which is no safetensors file of this folder",
                    fix="give a model whose index names plain *.safetensors files beside it",
                )
        return weight_map

    def _no_safetensors(self) -> InputError:
        pickles = sorted(path.name for pattern in _PICKLES for path in self._folder.glob(pattern))
        if pickles:
            return InputError(
                f"{self._folder} has no safetensors; {', '.join(pickles)} is not read, because pickles can run code",
                fix="give a copy of the model that holds safetensors",
            )
        return InputError(f"{self._folder} has neither {SINGLE} nor {INDEX}", fix="give the folder of a model")

    def _header(self, file: str) -> dict[str, Stored]:
        path = self._folder / file
        try:
            with safe_open(path, framework="pt") as opened:
                slices: dict[str, Any] = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                return {name: Stored(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error


def _write_shard(
    path: Path, tensors: Iterable[tuple[str, torch.Tensor]], progress: Callable[[str], None]
) -> dict[str, int]:
    """Write one file; returns the bytes of each tensor."""
    held = {}
    for name, tensor in tensors:
        held[name] = tensor.contiguous()
        progress(name)
    # transformers reads no file that does not say so.
    save_file(held, path, metadata={"format": "pt"})
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {name: tensor.nbytes for name, tensor in held.items()}


def _damaged(path: Path, error: Exception) -> InputError:
    """Why a file is no safetensors; says so where it is something else that is often found in its place."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as unreadable:
        return InputError(f"{path}: {unreadable.strerror}", fix=_DOWNLOAD)
    reason = f"is damaged ({error})"
    if start.startswith(b"version https://git-lfs"):
        reason = "is a Git LFS pointer, not the file itself"
    elif start.lstrip()[:1] == b"<":
        reason = "is a web page"
    elif start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        reason = "is a pickle under another name, which is not read because it can run code"
    return InputError(f"{path} {reason}", fix=_DOWNLOAD)
