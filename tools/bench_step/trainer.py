"""What is timed: one training step of anything, or its first layer, behind a few functions."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Shapes: B = sequences, S = sequence length, H = hidden.

Batch = dict[str, torch.Tensor]
"""``tokens`` and ``labels``, int64 [B, S], where the model is."""


@dataclass(frozen=True)
class Layer:
    """One transformer layer of a model, without what is around it."""

    module: torch.nn.Module
    """Its parameters."""
    forward: Callable[[torch.Tensor], torch.Tensor]
    """Of the residual stream to the same shape; codes of weights are made anew."""
    is_batch_first: bool = False
    """The residual stream is [B, S, H], not [S, B, H]."""


@dataclass(frozen=True)
class Trainer:
    """A model with its optimizer."""

    step: Callable[[Batch], float | torch.Tensor]
    """A whole training step: forward, backward, clipped gradients, optimizer. Returns the loss."""
    forward: Callable[[Batch], torch.Tensor]
    """The loss alone, with the graph that holds the activations."""
    layer: Layer
    """The first of its layers."""


def prefer_cudnn() -> AbstractContextManager:
    """Attention of the baselines: cuDNN's where it runs, the fastest of the others elsewhere."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)
