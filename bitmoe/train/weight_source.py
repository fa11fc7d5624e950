"""Where a model's latent weights come from, tensor by tensor: what conversion and ``run.init_from`` read.

A source is a sharded checkpoint of any layout (``sharded_weights.py``), a folder of latent weights in safetensors
(``weight_folder.py``), or a model of another project. None holds more than one layer in memory.
"""

from typing import Protocol

import torch

from bitmoe.config.schema import Config
from bitmoe.model.export_names import Slot


class WeightSource(Protocol):
    """One trained model: its config and its latent weights."""

    config: Config
    """``model``, ``moe``, ``quant`` and ``tokenizer`` are those of the model, ``model.vocab_size`` is known."""

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """One exported tensor (``bitmoe.model.export_names``) in the dtype the forward uses, on the CPU.

        Args:
            name: such as ``model.layers.0.self_attn.q_proj.weight``; the vocabulary has no padding rows.
            expert: of stacked experts, a single one, without their axis; None reads all.
        """

    def read_slot(self, slot: Slot, expert: int | None = None) -> torch.Tensor:
        """One tensor of one layer as a checkpoint fuses it, padding rows included."""
