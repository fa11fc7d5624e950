"""The weights of a checkpoint of any layout, read on one CPU without process groups.

torch's checkpoint files say which part of which global tensor lies where, so one layer of one tensor can be put
together from the parts of all ranks that hold some of it. The manifest is verified first (the files can hold code),
and whatever is read must have the fingerprint it was saved with: a file that was mixed up loads without any error.
"""

from functools import cached_property
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from bitmoe.config.choices import TokenizerKind
from bitmoe.config.errors import InputError
from bitmoe.config.from_dict import config_from_dict
from bitmoe.data.tokenizer import KIND_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from bitmoe.model.export_names import Slot, slots, split
from bitmoe.train.fingerprint import fingerprint, tensor_name
from bitmoe.train.manifest import verify


class ShardedWeights:
    """A ``WeightSource`` over a committed checkpoint; holds one tensor of one layer at a time.

    Args:
        path: the checkpoint's folder.

    Raises:
        InputError: the checkpoint is damaged, not ours, or of another model than its config says.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._manifest = verify(self.path)
        saved = self._manifest["state"].get("config")
        if saved is None:
            raise InputError(f"checkpoint {path} does not say which config made it", fix="choose another checkpoint")
        self.config = config_from_dict(saved)
        self._slots = {name: slot for slot in slots(self.config) for name in slot.names}
        self._reader = FileSystemReader(self.path)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._last: tuple[Slot, torch.Tensor] | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self._manifest["step"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer saved with the weights.

        Raises:
            InputError: it is not there, as in checkpoints from before they carried it, or damaged.
        """
        if (self.path / KIND_FILE).exists():
            return load_tokenizer(self.path)
        if self.config.tokenizer.kind is TokenizerKind.byte:
            return ByteTokenizer()
        raise InputError(
            f"checkpoint {self.path} holds no tokenizer: it was saved by an older version",
            fix="continue its run for a step, which saves a new one",
        )

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """One exported tensor, as ``WeightSource.read`` says."""
        slot = self._slots[name]
        return split(slot, self.read_slot(slot, expert), self.config)[name]

    def read_slot(self, slot: Slot, expert: int | None = None) -> torch.Tensor:
        """One tensor of one layer, checked against its fingerprint; of experts one is a view of all.

        Raises:
            InputError: the checkpoint has no such tensor, or another value than was saved.
        """
        if self._last is None or self._last[0] != slot:
            self._last = None  # let go of it before the next is read
            self._last = slot, self._read(slot)
        fused = self._last[1]
        return fused if expert is None else fused[expert]

    def _read(self, slot: Slot) -> torch.Tensor:
        name = tensor_name(slot.key, slot.layer)
        place = () if slot.layer is None else (slot.layer,)
        stored = self._metadata.state_dict_metadata.get(slot.key)
        if stored is None or any(index >= size for index, size in zip(place, stored.size, strict=False)):
            raise self._refusal(f"has no {name}")
        if tuple(stored.size[len(place) :]) != slot.shape:
            raise self._refusal(f"has {name} as {list(stored.size[len(place) :])}, its config as {list(slot.shape)}")
        value = torch.empty((1,) * len(place) + slot.shape, dtype=stored.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size((*place, *[0] * len(slot.shape))), value.size())
        plan = LoadPlan(create_read_items_for_chunk_list(slot.key, stored, [chunk]))
        self._reader.read_data(self._reader.prepare_local_plan(plan), _IntoOneTensor(value)).wait()
        value = value.view(slot.shape)
        if fingerprint(value, slot.layer) != self._manifest["fingerprints"].get(name):
            raise self._refusal(f"holds other values of {name} than were saved")
        return value

    def _refusal(self, problem: str) -> InputError:
        return InputError(f"checkpoint {self.path} {problem}", fix="restore it, or choose another checkpoint")


class _IntoOneTensor(DefaultLoadPlanner):
    """Puts all parts that are read into one tensor."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self._value = value

    def lookup_tensor(self, index) -> torch.Tensor:
        return self._value

    def load_bytes(self, read_item: ReadItem, value) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is no tensor")
