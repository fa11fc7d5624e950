"""An exported model as transformers runs it, in the memory of one layer.

``BitmoeForCausalLM`` is built without storage. Each of its parts takes its tensors from the written file when the
forward pass comes to it, and lets go of them when it has left.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from bitmoe.config.errors import InputError
from bitmoe.infer import BitmoeConfig, BitmoeForCausalLM
from bitmoe.infer.packed_linear import PackedLinear
from bitmoe.parallel.process_groups import local_device
from bitmoe.train.safetensors_shards import Shards

# Shapes: B = sequences, S = positions, V = vocabulary.

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class ExportedTensors(Protocol):
    """Tensors of the packed format, read from what was written."""

    config: BitmoeConfig
    """Of the model."""

    def names(self) -> Iterable[str]:
        """All there are."""

    def read(self, name: str) -> torch.Tensor:
        """One of them."""


class PackedTensors:
    """``ExportedTensors`` of a folder in the packed format.

    Args:
        folder: the model.

    Raises:
        InputError: its config or its files are damaged.
    """

    def __init__(self, folder: Path):
        self._shards = Shards(folder)
        self.config = BitmoeConfig.from_pretrained(folder)

    def names(self) -> Iterable[str]:
        return self._shards.stored.keys()

    def read(self, name: str) -> torch.Tensor:
        return self._shards.read(name)


@torch.no_grad()
def exported_logits(tensors: ExportedTensors, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Next-token logits fp32 [B, S, V].

    Raises:
        InputError: the tensors are not those of the model that their config describes.
    """
    with torch.device("meta"):
        model = BitmoeForCausalLM._from_config(tensors.config, attn_implementation="sdpa").eval()
    expected = set(model.state_dict()) - ({_HEAD} if tensors.config.tie_word_embeddings else set())
    if different := sorted(expected ^ set(tensors.names())):
        raise InputError(f"not the tensors of the model: {', '.join(different[:5])}", fix="convert it again")
    parts = {"model.embed_tokens": model.model.embed_tokens, "model.norm": model.model.norm, "lm_head": model.lm_head}
    parts |= {f"model.layers.{index}": layer for index, layer in enumerate(model.model.layers)}
    for prefix, part in parts.items():
        _stream(part, prefix, tensors)
    return model(tokens_BS.to(local_device()), use_cache=False).logits


def _stream(part: nn.Module, prefix: str, tensors: ExportedTensors) -> None:
    """Let a part of the model hold its tensors only while it computes."""

    def read(name: str) -> torch.Tensor:
        is_tied = name == _HEAD and tensors.config.tie_word_embeddings
        value = tensors.read(_EMBEDDING if is_tied else name).to(local_device())
        return value.float() if value.is_floating_point() else value

    def load(part: nn.Module, inputs: tuple) -> None:
        state = {name: read(f"{prefix}.{name}") for name in part.state_dict()}
        try:
            part.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise InputError(f"{prefix} does not fit its config ({error})", fix="convert it again") from error
        for module in part.modules():
            if isinstance(module, PackedLinear):
                module.repack()

    def release(part: nn.Module, inputs: tuple, output: object) -> None:
        part.to("meta")

    part.register_forward_pre_hook(load)
    part.register_forward_hook(release)
