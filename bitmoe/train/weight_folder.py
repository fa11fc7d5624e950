"""A folder of latent weights: what ``bitmoe convert to=checkpoint`` writes and ``run.init_from`` reads.

It holds no layout and no optimizer: safetensors with the tensors of each layer under their exported names, stacked
experts included, ``config.yaml``, the tokenizer, and ``manifest.json`` with the hash of every file. The vocabulary
keeps the padding rows it was trained with, which the loss counts. Unlike a run's checkpoints it cannot hold code.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch

from bitmoe.config.errors import InputError
from bitmoe.config.from_dict import config_from_dict
from bitmoe.data.tokenizer import Tokenizer, load_tokenizer
from bitmoe.model.export_names import Fusion, Slot, export_shapes, fuse, slots
from bitmoe.train.manifest import verify, write_manifest
from bitmoe.train.run_dir import RunDir
from bitmoe.train.safetensors_shards import INDEX, Shards, write_shards
from bitmoe.train.weight_source import WeightSource

_KIND = "latent weights"


def is_weight_folder(path: Path) -> bool:
    """Whether a folder is meant as one; says nothing about its being whole."""
    return (path / INDEX).is_file() and RunDir(path).config_file.is_file()


def write_weight_folder(
    source: WeightSource, folder: Path, progress: Callable[[str], None], tokenizer: Tokenizer | None = None
) -> None:
    """Write a model, in the memory of one of its layers.

    Args:
        source: the model.
        folder: an existing folder, which the caller gives its final name; files already there become part of it.
        progress: called with the name of each tensor.
        tokenizer: the model's, where it is known.
    """
    groups = groupby(slots(source.config), key=lambda slot: slot.layer)
    shards = [_tensors(source, list(layer)) for _, layer in groups]
    write_shards(folder, shards, progress)
    RunDir(folder).write_config(source.config)
    if tokenizer is not None:
        tokenizer.save(folder)
    write_manifest(folder, {"kind": _KIND})


class WeightFolder:
    """The ``WeightSource`` over such a folder; reads one tensor, of stacked experts one expert, at a time.

    Args:
        path: the folder.

    Raises:
        InputError: it is damaged, belongs to another user, or is of another model than its config says.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if verify(self.path).get("kind") != _KIND:
            raise InputError(f"{path} is no folder of weights", fix="give what bitmoe convert to=checkpoint wrote")
        self.config = config_from_dict(RunDir(self.path).load_config() or {})
        self._shards = Shards(self.path)
        shapes = {name: stored.shape for name, stored in self._shards.stored.items()}
        self._padded = {
            name: slot.shape for slot in slots(self.config) if slot.fusion is Fusion.vocabulary for name in slot.names
        }
        if shapes != export_shapes(self.config) | self._padded:
            raise InputError(f"{path}: tensors and config.yaml are of two models", fix="convert the model again")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer saved with the weights.

        Raises:
            InputError: there is none, or it is damaged.
        """
        return load_tokenizer(self.path)

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """One exported tensor, as ``WeightSource.read`` says."""
        tensor = self._shards.read(name, row=expert)
        return tensor[: self.config.model.vocab_size] if name in self._padded else tensor

    def read_slot(self, slot: Slot, expert: int | None = None) -> torch.Tensor:
        """One tensor of one layer as a checkpoint fuses it."""
        if slot.fusion is Fusion.vocabulary:
            return self._shards.read(slot.names[0])
        return fuse(slot, {name: self.read(name, expert) for name in slot.names}, self.config)


def _tensors(source: WeightSource, layer: list[Slot]) -> Iterator[tuple[str, torch.Tensor]]:
    for slot in layer:
        for name in slot.names:
            yield name, source.read_slot(slot) if slot.fusion is Fusion.vocabulary else source.read(name)
