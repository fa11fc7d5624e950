"""What is timed: one training step of anything, behind two functions."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Shapes: B = sequences, S = sequence length.

Batch = dict[str, torch.Tensor]
"""``tokens`` and ``labels``, int64 [B, S], where the model is."""


@dataclass(frozen=True)
class Trainer:
    """A model with its optimizer."""

    step: Callable[[Batch], float | torch.Tensor]
    """A whole training step: forward, backward, clipped gradients, optimizer. Returns the loss."""
    forward: Callable[[Batch], torch.Tensor]
    """The loss alone, with the graph that holds the activations."""


def prefer_cudnn() -> AbstractContextManager:
    """Attention of the baselines: cuDNN's where it runs, the fastest of the others elsewhere."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)
