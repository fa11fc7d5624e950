"""What a layer is built with: shapes, quantization policy, process groups, dtype and device, in one argument."""

from dataclasses import dataclass

import torch

from bitmoe.config.choices import Recompute, Wire
from bitmoe.config.schema import ModelConfig, MoEConfig
from bitmoe.parallel.process_groups import Groups
from bitmoe.quant.policy import QuantPolicy


@dataclass(frozen=True)
class LayerContext:
    """Everything a layer may depend on besides its input."""

    model: ModelConfig
    """Shape of the transformer."""
    moe: MoEConfig
    """Shape of the experts; num_experts = 0 for a dense model."""
    policy: QuantPolicy
    """Quantization groups and the current formats."""
    groups: Groups
    """Process groups."""
    sequence_parallel: bool
    """Activations between linears are split along the sequence over the tensor-parallel group."""
    recompute: Recompute
    """What the backward pass computes again."""
    dtype: torch.dtype
    """Dtype of parameters and activations."""
    device: torch.device
    """Where parameters live."""
    wire: Wire = Wire.codes
    """How codes travel between ranks."""

    def parameter(self, *shape: int) -> torch.nn.Parameter:
        """An uninitialized parameter of this shape."""
        return torch.nn.Parameter(torch.empty(*shape, dtype=self.dtype, device=self.device))
